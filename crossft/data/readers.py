"""Readers: a domain's name and the data root become a table of rows."""

from __future__ import annotations

import csv
import json
import re
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from crossft.data.table import Columns, Table
from crossft.errors import ConfigError, DataError

__all__ = ["Auto", "ImageFolder", "Reader", "TableFile", "refuse_columns", "table_of"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
TOO_LONG = 'has more fields than there are columns; put a text that holds the separator in quotes ("a, b")'
DETECTED = {
    "text": ("text", "sentence", "review", "content", "premise", "sentence1", "question"),
    "pair": ("text_pair", "hypothesis", "sentence2"),
    "label": ("label", "labels", "class", "target", "category", "score", "rating"),
    "image": ("image", "path", "file", "filename", "image_path"),
    "split": ("split",),
}


class Reader(ABC):
    """Turns a domain's name into a table. Write a subclass for a layout of your own and name it in ``data.reader``."""

    @abstractmethod
    def domains(self, root: Path) -> list[str]:
        """Names of the domains found under ``root``, sorted."""

    @abstractmethod
    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of domain ``name``.

        Raises:
            DataError: a file cannot be read or a column is missing.
        """


class ImageFolder(Reader):
    """Images as ``DOMAIN/CLASS/file`` or ``DOMAIN/{train,val,test}/CLASS/file``; ``DOMAIN/file`` where unlabeled.

    The folder name is the class. A first level made only of split names (train, val, valid, validation, dev, test)
    gives the splits. Hidden files and files that are not images are skipped.
    """

    def domains(self, root: Path) -> list[str]:
        """Folders under ``root`` that hold an image somewhere."""
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and _has_image(p))

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one folder."""
        folder = root / name
        refuse_columns(columns, f"{folder}: folders of images")
        tops = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
        split = bool(tops) and all(p.name.lower() in SPLIT_NAMES for p in tops)
        files = sorted(p for p in folder.rglob("*") if _is_image(p, folder))
        parts = [p.relative_to(folder).parts for p in files]
        depth = 1 if split else 0
        bare = [p for p in parts if len(p) <= depth + 1]
        if bare and len(bare) != len(parts):
            raise DataError(
                f"{folder / Path(*bare[0])}: an image outside any class folder, while others are in one; "
                "move it into DOMAIN/CLASS/ or remove it"
            )
        return Table(
            "image",
            list(files),
            None if bare else [p[depth] for p in parts],
            [str(p) for p in files],
            [SPLIT_NAMES[p[0].lower()] for p in parts] if split else None,
        )


def refuse_columns(columns: Columns, what: str) -> None:
    """Refuse column names where a domain has no columns.

    Args:
        columns: those asked for.
        what: the domain and what it holds, in the plural.

    Raises:
        ConfigError: one is named.
    """
    for field, name in asdict(columns).items():
        if name is not None:
            argument = "group" if field == "group" else f"{field}_column"
            raise ConfigError(
                f"data.{argument}={name!r}: {what} have no columns; drop the argument, or describe the domain by a "
                "table (DOMAIN.csv with the columns image, label and your own)"
            )


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _has_image(folder: Path) -> bool:
    return any(_is_image(p, folder) for p in folder.rglob("*"))


class TableFile(Reader):
    """One file a domain: ``DOMAIN.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` with text, text pairs or image paths.

    Image paths are relative to the file's folder. A row's label may be a list, or hold several names joined by ``|``.

    Args:
        suffix: file suffix where it is none of the four (``_labelled.txt``); such a file is read as separated values.
        separator: column separator of separated values. Default: tab for ``.tsv``, comma for ``.csv``.
        names: column names of a file without a header line, in order. Default: the first line is the header.
        quoting: whether ``"`` quotes a field. Turn off for plain ``text<TAB>label`` files.
    """

    def __init__(
        self,
        suffix: str | None = None,
        separator: str | None = None,
        names: list[str] | None = None,
        quoting: bool = True,
    ) -> None:
        self.suffix, self.separator, self.names, self.quoting = suffix, separator, names, quoting

    def _suffixes(self) -> tuple[str, ...]:
        return (self.suffix,) if self.suffix else TABLE_SUFFIXES

    def domains(self, root: Path) -> list[str]:
        """Files under ``root`` with a known suffix, without it."""
        names = {p.name[: -len(s)] for s in self._suffixes() for p in root.iterdir() if p.name.endswith(s)}
        return sorted(n for n in names if n and not n.startswith("."))

    def file(self, root: Path, name: str) -> Path:
        """The domain's file.

        Raises:
            DataError: there is none, or more than one.
        """
        found = [root / f"{name}{s}" for s in self._suffixes() if (root / f"{name}{s}").is_file()]
        if len(found) != 1:
            what = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"domain {name!r} needs one file {name}{{{','.join(self._suffixes())}}} in {root}; found {what}"
            )
        return found[0]

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one file."""
        path = self.file(root, name)
        frame = self._frame(path)
        if frame.empty:
            raise DataError(f"{path}: no rows")
        return table_of(frame, path, columns)

    def _frame(self, path: Path) -> pd.DataFrame:
        try:
            if path.suffix == ".parquet":
                return pd.read_parquet(path)
            if path.suffix == ".jsonl":
                return _json_lines(path)
            return self._separated(path)
        except DataError:
            raise
        except pd.errors.EmptyDataError as error:
            raise DataError(f"{path}: no rows") from error
        except (ValueError, OSError, UnicodeError, pd.errors.ParserError) as error:
            raise DataError(f"{path}: cannot be read as {path.suffix[1:] or 'text'}: {error}") from error

    def _separated(self, path: Path) -> pd.DataFrame:
        """Separated values; pandas only warns where every row is longer than the header, and drops what is left over.

        ``index_col=False`` keeps it from taking the first column of such a file for an index.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header", pd.errors.ParserWarning)
            try:
                return pd.read_csv(
                    path,
                    sep=self.separator or ("\t" if path.suffix == ".tsv" else ","),
                    header=None if self.names else "infer",
                    names=self.names,
                    index_col=False,
                    quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
                    dtype=str,
                    keep_default_na=False,
                    na_values=[""],
                )
            except pd.errors.ParserWarning as error:
                raise DataError(f"{path}: line {1 if self.names else 2} {TOO_LONG}") from error
            except pd.errors.ParserError as error:
                long = re.search(r"Expected \d+ fields in line (\d+)", str(error))
                if long is None:
                    raise
                raise DataError(f"{path}: line {long[1]} {TOO_LONG}") from error


def _json_lines(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise DataError(f"{path}: row {number} is not a JSON object of columns")
    return pd.DataFrame(rows)


def table_of(frame: pd.DataFrame, path: Path, columns: Columns) -> Table:
    """Make a table from named columns of ``frame``; ``path`` names the file in messages and resolves image paths.

    Raises:
        DataError: a named column is missing, or neither a text nor an image column is found.
    """
    present = [str(c) for c in frame.columns]
    chosen = {k: _column(k, getattr(columns, k), present, path) for k in (*DETECTED, "id", "group")}
    if columns.image is None and chosen["text"] is not None:
        chosen["image"] = None
    if chosen["text"] is None and chosen["image"] is None:
        raise DataError(
            f"{path}: no text or image column; columns present: {', '.join(present)}; name one with "
            "data.text_column or data.image_column"
        )

    def values(key: str) -> list[Any] | None:
        return None if chosen[key] is None else frame[chosen[key]].tolist()

    names = values("id") or range(1, len(frame) + 1)
    image = values("image")
    inputs: list[Any]
    if image is not None:
        inputs = [None if _missing(v) else path.parent / str(v) for v in image]
    else:
        first, second = values("text") or [], values("pair")
        inputs = list(first) if second is None else list(zip(first, second))
    splits, groups = values("split"), values("group")
    return Table(
        "image" if image is not None else "text",
        inputs,
        values("label"),
        [f"{path}: row {n}" for n in names],
        None if splits is None else [None if _missing(v) else _split(str(v)) for v in splits],
        None if groups is None else [str(v) for v in groups],
    )


def _column(key: str, name: str | None, present: list[str], path: Path) -> str | None:
    if name is None:
        return next((c for c in DETECTED.get(key, ()) if c in present), None)
    if name not in present:
        argument = "data.group" if key == "group" else f"data.{key}_column"
        raise DataError(f"{path}: no column {name!r} ({argument}); columns present: {', '.join(present)}")
    return name


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _split(value: str) -> str:
    return SPLIT_NAMES.get(value.strip().lower(), value)


class Auto(Reader):
    """Images in folders, tables in files, saved Hugging Face data sets: whichever has the domain's name."""

    def __init__(self) -> None:
        from crossft.data.external import HuggingFace

        self.readers: tuple[Reader, ...] = (HuggingFace(), TableFile(), ImageFolder())

    def domains(self, root: Path) -> list[str]:
        """All domains that any of the readers finds."""
        return sorted({name for reader in self.readers for name in reader.domains(root)})

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one domain."""
        found = [r for r in self.readers if name in r.domains(root)]
        if len(found) > 1:
            raise ConfigError(
                f"domain {name!r} is both a folder and a file under {root}; rename one or set data.reader to one of "
                + ", ".join(f"crossft.data.{type(r).__name__}" for r in found)
            )
        if not found:
            raise DataError(f"no domain {name!r} under {root}")
        return found[0].read(root, name, columns)
