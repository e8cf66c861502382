"""Methods of this axis, one file each."""

from crossft.callbacks.adaptation.cdan import CDAN
from crossft.callbacks.adaptation.dann import DANN

__all__ = ["CDAN", "DANN"]
