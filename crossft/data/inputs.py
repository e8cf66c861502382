"""Files to predict: rows without labels, in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossft.data.checks import content_of
from crossft.data.labels import blank
from crossft.data.prepare import Prepared
from crossft.data.readers import IMAGE_SUFFIXES, TABLE_SUFFIXES, TableFile
from crossft.data.splits import sample_ids
from crossft.data.table import Columns, Table
from crossft.errors import DataError
from crossft.types import Domain

__all__ = ["read_inputs"]


def read_inputs(paths: Sequence[str], columns: Columns) -> Prepared:
    """Rows of image files, folders of images (all files below, by path), and tables; in the order of ``paths``.

    Raises:
        DataError: a path that does not exist or is none of these, or a row that cannot be read.
    """
    tables = [_table(Path(path), columns) for path in paths]
    table = Table(
        tables[0].modality,
        [v for t in tables for v in t.inputs],
        None,
        [v for t in tables for v in t.where],
    )
    if any(t.modality != table.modality for t in tables):
        raise DataError(f"data.inputs={list(paths)} mixes images and texts; predict them one after the other")
    content, problems = content_of(table, "inputs", "off")
    if problems:
        row = min(problems)
        raise DataError(f"{table.where[row]}: {problems[row]}; repair or remove it")
    n = len(table)
    return Prepared(
        Domain("inputs", "eval"), table.modality, table.inputs, table.where, sample_ids(content),
        np.full(n, 2, np.int8), blank(n, "multiclass", 0), np.zeros(n, bool), True, "inputs", [],
    )  # fmt: skip


def _table(path: Path, columns: Columns) -> Table:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"data.inputs: no image under {path}")
        return Table("image", files, None, [str(p) for p in files])
    if not path.is_file():
        raise DataError(f"data.inputs: no file {path}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Table("image", [path], None, [str(path)])
    if path.suffix in TABLE_SUFFIXES:
        return TableFile(suffix=path.suffix).read(path.parent, path.stem, columns)
    allowed = ", ".join([*TABLE_SUFFIXES, *sorted(IMAGE_SUFFIXES)])
    raise DataError(f"data.inputs: {path} is neither an image nor a table; allowed suffixes: {allowed}")
