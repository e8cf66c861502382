"""Readers for data that other libraries hold: Hugging Face datasets and torch datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.data import Dataset

from crossft.data.readers import SPLIT_NAMES, Reader, refuse_columns, table_of
from crossft.data.table import Columns, Concat, Table
from crossft.errors import ConfigError, DataError

__all__ = ["HuggingFace", "TorchDatasets"]


class HuggingFace(Reader):
    """Hugging Face data sets: a folder written by ``save_to_disk`` for each domain, or one of the hub.

    Needs the extra ``crossft[hub]``. Data sets that run scripts are not supported (``datasets`` >= 4 has none).

    Args:
        path: hub name or ``load_dataset`` builder (``json``, ``csv``, ``imagefolder``); each domain is then the
            configuration of that name. Default: ``ROOT/DOMAIN`` is a folder written by ``save_to_disk``.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def domains(self, root: Path) -> list[str]:
        """Saved folders under ``root``; for a hub name, its configurations."""
        if self.path is not None:
            return sorted(self._asked(_datasets().get_dataset_config_names, self.path))
        marks = ("dataset_info.json", "dataset_dict.json", "state.json")
        return sorted(p.name for p in root.iterdir() if p.is_dir() and any((p / m).is_file() for m in marks))

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one data set; its own splits are the given splits."""
        library = _datasets()
        place = Path(f"{self.path}/{name}") if self.path else root / name
        data = self._asked(library.load_dataset, self.path, name) if self.path else _saved(library, place)
        if not hasattr(data, "keys"):
            return self._one(data, place, columns, None)
        unknown = [k for k in data if k.lower() not in SPLIT_NAMES]
        if unknown:
            raise DataError(f"{place}: unknown split {unknown[0]!r}; allowed: {', '.join(SPLIT_NAMES)}")
        parts = [self._one(data[k], place / k, columns, SPLIT_NAMES[k.lower()]) for k in data]
        return _joined(parts)

    def _asked(self, call: Callable[..., Any], *arguments: str) -> Any:
        """What the library finds under ``path``; it raises errors of many kinds, of its own and of the network."""
        try:
            return call(*arguments)
        except Exception as error:
            raise DataError(
                f"data.reader.path={self.path!r} cannot be read ({type(error).__name__}: {error}); it must be a data "
                "set of the hub or a builder such as csv. Check the name and the network, or write the data set with "
                "save_to_disk to a folder a domain under data.root and leave path out"
            ) from error

    def _one(self, data: Any, place: Path, columns: Columns, split: str | None) -> Table:
        library = _datasets()
        images = [k for k, f in data.features.items() if isinstance(f, library.Image)]
        named = {k: f for k, f in data.features.items() if isinstance(f, library.ClassLabel)}
        frame: pd.DataFrame = data.remove_columns(images).to_pandas()
        for key, feature in named.items():
            frame[key] = [None if v < 0 else feature.int2str(int(v)) for v in frame[key]]
        image = columns.image or (images[0] if images else None)
        if image in images:
            frame[image] = "-"
        table = table_of(frame, place / "rows", columns)
        if image in images:
            table.modality, table.inputs = "image", _Column(data, str(image))
        if split is not None:
            table.splits = [split] * len(table)
        return table


class TorchDatasets(Reader):
    """Any map-style torch ``Dataset`` of (input, label) items, one for each domain.

    An input is a PIL image, an array [h, w(, c)], a uint8 tensor [c, h, w], a float tensor [c, h, w] (passed to the
    backbone as it is), a string or a pair of strings. A label is a number, a string, or a list of names.

    Args:
        datasets: domain name -> data set, as ``{class_path, init_args}`` in a config.
    """

    def __init__(self, datasets: dict[str, Dataset[Any]]) -> None:
        self.datasets = datasets

    def domains(self, root: Path) -> list[str]:
        """The names given."""
        return sorted(self.datasets)

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one data set; inputs stay lazy, every label is read once."""
        refuse_columns(columns, f"domain {name!r}: torch data sets")
        data = self.datasets[name]
        if not hasattr(data, "__len__"):
            raise ConfigError(f"data.reader: the data set of domain {name!r} has no length; only map-style sets work")
        items: Any = data
        first = items[0][0]
        text = isinstance(first, str) or (isinstance(first, tuple) and all(isinstance(v, str) for v in first))
        labels = [items[i][1] for i in range(len(items))]
        labels = [v.tolist() if hasattr(v, "tolist") else v for v in labels]
        inputs: Sequence[Any] = [items[i][0] for i in range(len(items))] if text else _Column(items, 0)
        where = [f"{type(data).__name__} {name!r}: item {i}" for i in range(len(items))]
        return Table("text" if text else "image", inputs, labels, where)


class _Column(Sequence[Any]):
    """One field of every item, loaded when asked for."""

    def __init__(self, data: Any, key: Any) -> None:
        self.data, self.key = data, key

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[int(index)][self.key]


def _saved(library: Any, folder: Path) -> Any:
    try:
        return library.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a saved data set: {error}; write it again") from error


def _joined(parts: list[Table]) -> Table:
    labels = [v for p in parts for v in (p.labels or [None] * len(p))]
    return Table(
        parts[0].modality,
        Concat([p.inputs for p in parts]) if parts[0].modality == "image" else [v for p in parts for v in p.inputs],
        None if all(p.labels is None for p in parts) else labels,
        [v for p in parts for v in p.where],
        [v for p in parts for v in (p.splits or [])],
        None if parts[0].groups is None else [v for p in parts for v in (p.groups or [])],
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face data sets need the package datasets: pip install 'crossft[hub]'") from error
    return datasets
