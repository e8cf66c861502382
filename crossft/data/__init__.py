"""Named domains: reading, checking, splitting, mixing. The public face is `DomainData` and the readers."""

from crossft.data.external import HuggingFace, TorchDatasets
from crossft.data.module import DomainData
from crossft.data.readers import Auto, ImageFolder, Reader, TableFile
from crossft.data.table import Columns, Table

__all__ = [
    "Auto",
    "Columns",
    "DomainData",
    "HuggingFace",
    "ImageFolder",
    "Reader",
    "Table",
    "TableFile",
    "TorchDatasets",
]
