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
        domain_column: column that names each row's domain, where one data set holds them all; without ``path``,
            ``ROOT`` itself is then the saved folder. Default: a data set or configuration a domain.
    """

    def __init__(self, path: str | None = None, domain_column: str | None = None) -> None:
        self.path, self.domain_column = path, domain_column

    def domains(self, root: Path) -> list[str]:
        """Saved folders under ``root``; for a hub name, its configurations; the values of ``domain_column``."""
        if self.domain_column is not None:
            return sorted({name for part in self._parts(root, "").values() for name in self._named(part)})
        if self.path is not None:
            return sorted(self._asked(_datasets().get_dataset_config_names, self.path))
        marks = ("dataset_info.json", "dataset_dict.json", "state.json")
        return sorted(p.name for p in root.iterdir() if p.is_dir() and any((p / m).is_file() for m in marks))

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        """Rows of one data set; its own splits are the given splits."""
        place = Path(f"{self.path}/{name}") if self.path else root / name
        parts = self._parts(root, name)
        if self.domain_column is not None:
            rows = {k: [i for i, v in enumerate(self._named(part)) if v == name] for k, part in parts.items()}
            parts = {k: part.select(rows[k]) for k, part in parts.items() if rows[k]}
        if "" in parts:
            return self._one(parts[""], place, columns, None)
        unknown = [k for k in parts if k.lower() not in SPLIT_NAMES]
        if unknown:
            raise DataError(f"{place}: unknown split {unknown[0]!r}; allowed: {', '.join(SPLIT_NAMES)}")
        if not parts:
            raise DataError(f"{place}: no rows")
        return _joined([self._one(part, place / k, columns, SPLIT_NAMES[k.lower()]) for k, part in parts.items()])

    def _parts(self, root: Path, name: str) -> dict[str, Any]:
        """The data set by split; "" where it has none."""
        library, shared = _datasets(), self.domain_column is not None
        if self.path is not None:
            data = self._asked(library.load_dataset, self.path, *([] if shared else [name]))
        else:
            data = _saved(library, root if shared else root / name)
        return dict(data) if hasattr(data, "keys") else {"": data}

    def _named(self, part: Any) -> list[str]:
        """The domain of each row."""
        feature = part.features.get(self.domain_column)
        if feature is None:
            raise DataError(
                f"data.reader.domain_column={self.domain_column!r} is not a column; columns present: "
                + ", ".join(part.column_names)
            )
        values = part[self.domain_column]
        return [feature.int2str(v) for v in values] if hasattr(feature, "int2str") else [str(v) for v in values]

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

    def __init__(self, datasets: dict[str, Dataset]) -> None:  # type: ignore[type-arg]  # jsonargparse: no generics
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
        text: bool | None = None
        inputs: list[Any] = []
        labels: list[Any] = []
        problems: dict[int, str] = {}
        for i in range(len(items)):
            value: Any = None
            label: Any = None
            try:
                value, label = items[i][:2]
            except Exception as error:  # whatever the data set raises on this item
                problems[i] = f"unreadable: {type(error).__name__}: {error}"
            else:
                text = _is_text(value) if text is None else text
            inputs.append(value if text else None)
            labels.append(label.tolist() if hasattr(label, "tolist") else label)
        where = [f"{type(data).__name__} {name!r}: item {i}" for i in range(len(items))]
        table = Table("text" if text else "image", inputs if text else _Column(items, 0), labels, where)
        table.problems = problems
        return table


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))


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
