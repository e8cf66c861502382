"""What the page shows beyond the summaries: curves, calibration, ledgers and configs, read from run folders.

Each function takes the finished runs of one group and passes over runs that lack the file (older ones, W&B's).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from crossft.errors import RunError
from crossft.reports.records import domain_keys, primary_of
from crossft.reports.tables import label
from crossft.runs import RunFolder, read_json, read_metrics

__all__ = [
    "Bin",
    "Curve",
    "Ledger",
    "TransferMatrix",
    "config_differences",
    "learning_curves",
    "ledgers",
    "reliabilities",
    "transfer_matrices",
]

_POINTS = 60
"""Longer curves are means over as many equal spans of steps."""
_NAMES = ("arm", "experiment", "seed_everything", "run", "wandb")
"""Config keys that say which run it is, and where it lies."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Curve:
    """A metric over training: per step (from 1) the mean, smallest and largest value of ``seeds`` seeds."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


class Bin(NamedTuple):
    """The rows of one bin of the confidence, of all seeds: their number, mean confidence, and accuracy."""

    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Ledger:
    """What trained when: ``ledger.csv`` of one run, and the arms whose runs have the same.

    Attributes:
        arms: their names.
        rows: the lines of the file.
        differs: whether phases began at other steps, or were others, in another seed.
    """

    arms: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    differs: bool


@dataclass(frozen=True)
class TransferMatrix:
    """R of an arm's sequences, mean over its seeds.

    Attributes:
        arm: its name.
        domains: [t], in the order they were learned.
        metric: its name.
        values: [t, t]: on domain j after learning domain i; NaN where a seed has no value.
        seeds: their number.
    """

    arm: str
    domains: tuple[str, ...]
    metric: str
    values: np.ndarray[Any, Any]
    seeds: int


def _folders(runs: pd.DataFrame) -> Iterator[tuple[str, RunFolder]]:
    for arm, path in zip(runs["arm"], runs["path"]):
        if Path(path).is_dir():
            yield str(arm), RunFolder(path)


def learning_curves(runs: pd.DataFrame) -> dict[str, dict[str, Curve]]:
    """By title: training loss and each domain's primary metric in validation; then by arm."""
    wanted = {"train/loss": "training loss"}
    for key in domain_keys(runs):
        name = f"{key}/val/{primary_of(runs, key)}"
        wanted[name] = label(name).replace(" val ", " validation ")
    found: dict[str, dict[str, list[pd.Series[float]]]] = {title: {} for title in wanted.values()}
    for arm, folder in _folders(runs):
        try:
            rows = read_metrics(folder.metrics)
        except RunError:
            continue
        for name, title in wanted.items():
            values = {row.step + 1: row.value for row in rows if row.name == name and np.isfinite(row.value)}
            if values:
                found[title].setdefault(arm, []).append(pd.Series(values))
    return {title: {arm: _curve(seeds) for arm, seeds in arms.items()} for title, arms in found.items() if arms}


def _curve(seeds: list[pd.Series[float]]) -> Curve:
    table = pd.concat(seeds, axis=1).sort_index()
    if len(table) > _POINTS:
        last = int(table.index.max())
        span = -(-last // _POINTS)
        table = table.groupby(np.minimum(((table.index - 1) // span + 1) * span, last)).mean()
    common = table.dropna()
    table = common if len(common) else table
    low, mean, high = (getattr(table, name)(axis=1).to_list() for name in ("min", "mean", "max"))
    return Curve(tuple(map(int, table.index)), tuple(mean), tuple(low), tuple(high), len(seeds))


def reliabilities(runs: pd.DataFrame) -> dict[str, dict[str, list[Bin]]]:
    """By domain, targets first, and arm: the bins of the final test that have rows, added up over the seeds."""
    roles = {name: role for domains in runs["domains"] for role, names in domains.items() for name in names}
    order = {"target": 0, "source": 1}
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for arm, folder in _folders(runs):
        for file in sorted(folder.path.joinpath("calibration").glob("*.csv")):
            with file.open(newline="", encoding="utf-8") as text:
                rows = [
                    (int(r["rows"]), float(r["confidence"] or 0), float(r["accuracy"] or 0))
                    for r in csv.DictReader(text)
                ]
            counts = np.array([(n, n * confidence, n * accuracy) for n, confidence, accuracy in rows])
            arms = found.setdefault(file.stem, {})
            arms[arm] = arms[arm] + counts if arm in arms else counts
    names = sorted(found, key=lambda name: (order.get(roles.get(name, ""), 2), name))
    return {f"{roles.get(n, 'eval')} ({n})": {a: _bins(counts) for a, counts in found[n].items()} for n in names}


def _bins(counts: np.ndarray[Any, Any]) -> list[Bin]:
    return [Bin(int(n), float(c / n), float(a / n)) for n, c, a in counts if n]


def ledgers(runs: pd.DataFrame) -> list[Ledger]:
    """The distinct ledgers, in order of arms; of an arm the first seed's."""
    own: dict[str, list[tuple[tuple[str, ...], ...]]] = {}
    for arm, folder in _folders(runs):
        if folder.ledger.is_file():
            with folder.ledger.open(newline="", encoding="utf-8") as text:
                own.setdefault(arm, []).append(tuple(tuple(row) for row in csv.reader(text)))
    arms: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for arm, found in own.items():
        arms.setdefault(found[0], []).append(arm)
    return [
        Ledger(
            tuple(names),
            tuple(dict(zip(lines[0], line)) for line in lines[1:]),
            any(len(set(own[name])) > 1 for name in names),
        )
        for lines, names in arms.items()
        if len(lines) > 1
    ]


def transfer_matrices(runs: pd.DataFrame) -> list[TransferMatrix]:
    """One an arm and order of domains, from each run's ``sequence.json``; a run without a whole one is passed over."""
    found: dict[tuple[str, tuple[str, ...], str], list[np.ndarray[Any, Any]]] = {}
    for arm, folder in _folders(runs):
        try:
            content = read_json(folder.sequence)
            key = (arm, tuple(content["domains"]), str(content["metric"]))
            matrix = np.array(content["matrix"], np.float64).reshape(len(key[1]), len(key[1]))
        except (RunError, KeyError, TypeError, ValueError):
            continue
        found.setdefault(key, []).append(matrix)
    return [TransferMatrix(*key, np.mean(matrices, 0), len(matrices)) for key, matrices in found.items()]


def config_differences(runs: pd.DataFrame) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The config keys in which the arms differ, and each arm's values, of its first run, without those it lacks."""
    flat: dict[str, dict[str, str]] = {}
    for arm, folder in _folders(runs):
        if arm not in flat and folder.config.is_file():
            config = _LOADER(folder.config.read_text(encoding="utf-8")).get_single_data()
            flat[arm] = dict(_flat({k: v for k, v in (config or {}).items() if k not in _NAMES}, ""))
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {key: {values.get(key) for values in flat.values()} for key in keys}
    differing = [key for key, values in found.items() if len(values) > 1 and values != {None, "None"}]
    return differing, {arm: {k: values[k] for k in differing if k in values} for arm, values in flat.items()}


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted keys; an object's class stands under the object's own key, without its package."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield key, str(value["class_path"]).rpartition(".")[2]
        yield from _flat(value.get("init_args") or {}, key)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, str(value)
