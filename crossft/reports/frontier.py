"""Target gain against source retention: one point an arm, and the arms that no other beats in both."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from crossft.reports.records import after_key, domain_keys
from crossft.reports.stats import Interval, interval
from crossft.reports.tables import label
from crossft.runs import higher_is_better

__all__ = ["Tradeoff", "pareto_front", "tradeoff_of"]


@dataclass(frozen=True)
class Tradeoff:
    """The arms as points.

    Attributes:
        points: by arm, what the source retains (x) and the target gains (y), each with its interval.
        x_label, y_label: what the axes show.
        front: the arms on the Pareto front, by rising x.
        y_up: whether more is better on y.
    """

    points: dict[str, tuple[Interval, Interval]]
    x_label: str
    y_label: str
    front: tuple[str, ...]
    y_up: bool


def pareto_front(x: list[float], y: list[float]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other, by rising x."""
    points = list(zip(x, y))
    front = [i for i, (a, b) in enumerate(points) if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points)]
    return sorted(front, key=lambda i: points[i])


def tradeoff_of(runs: pd.DataFrame) -> Tradeoff | None:
    """The arms of one group of comparable runs as points; None where no arm has both values.

    Intervals are over seeds. With several sources or targets a run counts with their mean. Where no run knows its
    retention (its gain), x is the source (y the target) after fine-tuning. Only finished runs count.
    """
    runs = runs[runs["status"] == "finished"]
    xs, x_label, x_up = _axis(runs, "source", "retention", "after / before")
    ys, y_label, y_up = _axis(runs, "target", "gain", "after - before")
    points: dict[str, tuple[Interval, Interval]] = {}
    for arm in dict.fromkeys(runs["arm"]):
        both = (runs["arm"] == arm) & xs.notna() & ys.notna()
        if both.any():
            points[arm] = (interval(xs[both].tolist()), interval(ys[both].tolist()))
    if not points:
        return None
    signs = (1 if x_up else -1, 1 if y_up else -1)
    names, pairs = list(points), list(points.values())
    front = pareto_front([signs[0] * x.mean for x, _ in pairs], [signs[1] * y.mean for _, y in pairs])
    return Tradeoff(points, x_label, y_label, tuple(names[i] for i in front), y_up)


def _axis(runs: pd.DataFrame, role: str, relative: str, how: str) -> tuple[pd.Series[float], str, bool]:
    """Values a run, the axis label, and whether more is better: retention or gain where some run knows it."""
    keys = [key for key, found in domain_keys(runs).items() if found == role]
    known = [f"{key}/{relative}" for key in keys if f"{key}/{relative}" in runs]
    known = [column for column in known if runs[column].notna().any()]
    columns = known or [c for c in (after_key(runs, key) for key in keys) if c in runs]
    if not columns:
        return pd.Series(float("nan"), index=runs.index), role, True
    many = f" (mean of {len(columns)})" if len(columns) > 1 else ""
    text = f"{role} {relative}: {how}" if known else f"{label(columns[0])} after fine-tuning"
    return runs[columns].mean(axis=1, skipna=False), text + many, bool(known) or higher_is_better(columns[0])
