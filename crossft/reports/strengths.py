"""What each method gains on the target for what it loses on the source, over its strengths: fronts and hypervolumes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from crossft.errors import RunError
from crossft.reports.frontier import pareto_front
from crossft.reports.records import after_key, domain_keys
from crossft.reports.stats import Interval, interval
from crossft.runs import gain, higher_is_better, retention

__all__ = ["BLENDS", "Frontier", "Point", "frontiers", "hypervolume", "with_blends"]

BLENDS = "blends.csv"
"""In a run folder: what ``crossft average RUN --output RUN/blends.csv`` measured on the line from its start."""


@dataclass(frozen=True)
class Point:
    """One strength of a method.

    Attributes:
        strength: as in the arm's name (``weight=10``); empty where the arm has one setting.
        retention: source after / before, over seeds; of several sources their mean.
        gain: target after - before, over seeds; of several targets their mean.
        front: whether no point of any method is better in one mean without being worse in the other.
    """

    strength: str
    retention: Interval
    gain: Interval
    front: bool


@dataclass(frozen=True)
class Frontier:
    """All strengths of a method, by falling retention, and the area they dominate.

    Attributes:
        method: the arms' name before the first comma.
        points: its strengths.
        hypervolume: see ``hypervolume``; each seed's own, over seeds.
    """

    method: str
    points: tuple[Point, ...]
    hypervolume: Interval

    def best(self, least: float) -> Interval | None:
        """The largest mean gain among the strengths whose mean retention is at least ``least``."""
        kept = [p.gain for p in self.points if p.retention.mean >= least]
        return max(kept, key=lambda g: g.mean) if kept else None


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area dominated by the points, down to the reference (Zitzler & Thiele 1998); more is better in both coordinates.

    With retention and gain and the reference (0, 0), 1 x g is a method that loses nothing and gains g.

    Args:
        points: (x, y); those that are not better than the reference in both add nothing.
        reference: the corner.

    Example:
        >>> hypervolume([(1.0, 0.2), (0.5, 0.4), (0.4, 0.3)])
        0.3
    """
    area, height = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        if x > reference[0] and y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return round(area, 12)


def with_blends(records: pd.DataFrame) -> pd.DataFrame:
    """Add, for every run that has a ``blends.csv``, one run a blend: arm ``ARM+wiseft,alpha=0.5``."""
    found: list[dict[str, Any]] = []
    for record in records[records["status"] == "finished"].to_dict("records"):
        file = Path(record["path"]) / BLENDS
        if file.is_file():
            found += _blends({str(k): v for k, v in record.items()}, file, domain_keys(records))
    return pd.concat([records, pd.DataFrame(found)], ignore_index=True) if found else records


def _blends(record: dict[str, Any], file: Path, keys: dict[str, str]) -> list[dict[str, Any]]:
    try:
        lines = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
        rows = [(line.pop("model"), {k: float(v) for k, v in line.items() if v}) for line in lines]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is not a table of blends ({error}); write it anew with crossft average RUN") from error
    found = []
    for model, values in rows:
        kind, _, alpha = model.partition(" ")
        if kind != "alpha":
            continue
        new: dict[str, Any] = {**record, **values}
        new["arm"] = f"{record['arm']}+wiseft,alpha={alpha}"
        for key in keys:
            column = after_key(pd.DataFrame([record]), key)
            before, after, up = record.get(f"{column}/before"), values.get(column), higher_is_better(column)
            new[f"{key}/gain"], new[f"{key}/retention"] = gain(before, after, up), retention(before, after, up)
        found.append(new)
    return found


def frontiers(runs: pd.DataFrame) -> list[Frontier]:
    """One frontier a method, by falling hypervolume.

    Args:
        runs: comparable runs (one of ``crossft.reports.records.groups``); only finished ones count.

    Raises:
        RunError: no finished run has both a gain and a retention.
    """
    runs = runs[runs["status"] == "finished"].copy()
    runs["method"] = [str(arm).partition(",")[0] for arm in runs["arm"]]
    runs["x"] = _mean(runs, "source", "retention")
    runs["y"] = _mean(runs, "target", "gain")
    runs = runs[runs["x"].notna() & runs["y"].notna()].drop_duplicates(["arm", "seed"], keep="last")
    if not len(runs):
        raise RunError(
            "no finished run has both target gain and source retention: they need a starting model that knows the "
            "source and whose head the target shares (before=true)"
        )
    points = {str(arm): (interval(own["x"].tolist()), interval(own["y"].tolist())) for arm, own in runs.groupby("arm")}
    arms = list(points)
    front = {arms[i] for i in pareto_front([points[a][0].mean for a in arms], [points[a][1].mean for a in arms])}
    found = []
    for method, own in runs.groupby("method", sort=False):
        mine = sorted(set(own["arm"]), key=lambda arm: -points[arm][0].mean)
        volumes = [hypervolume(list(zip(some["x"], some["y"]))) for _, some in own.groupby("seed")]
        made = tuple(Point(arm.partition(",")[2], *points[arm], arm in front) for arm in mine)
        found.append(Frontier(str(method), made, interval(volumes)))
    return sorted(found, key=lambda f: -f.hypervolume.mean)


def _mean(runs: pd.DataFrame, role: str, what: str) -> pd.Series[float]:
    columns = [f"{key}/{what}" for key, own in domain_keys(runs).items() if own == role and f"{key}/{what}" in runs]
    if not columns:
        return pd.Series(float("nan"), index=runs.index)
    return runs[columns].astype(float).mean(axis=1, skipna=False)
