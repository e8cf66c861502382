"""Pictures: the learning curves of a run, and target gain against source retention of the arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crossft.errors import RunError
from crossft.reports.frontier import Tradeoff, tradeoff_of
from crossft.reports.stats import Interval
from crossft.reports.tables import label
from crossft.runs import RunFolder, read_metrics, replacing

__all__ = ["frontier_picture", "learning_curves", "tradeoff"]

# Okabe & Ito's palette, told apart with any color vision; each color has its own marker or dash beside it.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
_ROLE_COLORS = {"source": _COLORS[0], "target": _COLORS[1], "train": _COLORS[7]}
_INK = {False: ("#1f2328", "#ffffff", "#d0d7de"), True: ("#e6edf3", "#161b22", "#3d444d")}
_ROWS_SMOOTHED = 60


@contextmanager
def _style(dark: bool) -> Iterator[None]:
    ink, paper, line = _INK[dark]
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink)
    faces = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper)
    lines = dict.fromkeys(("axes.edgecolor", "grid.color"), line)
    shape = {"axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    text = {"font.size": 10, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 9}
    settings: Any = {**colors, **faces, **lines, **shape, **text, "grid.linewidth": 0.6}
    with mpl.rc_context(settings):
        yield


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144, format="png", metadata={"Software": ""})
    return path


def learning_curves(run: Path | str, path: Path | str | None = None, *, dark: bool = False) -> Path:
    """Draw the learning curves of a run from its ``metrics.csv``: losses, scores, loss terms, learning rates.

    Args:
        run: the run folder.
        path: the PNG to write; ``figures/learning_curves.png`` of the run by default.
        dark: light lines on dark.

    Returns:
        The picture's path.

    Raises:
        RunError: the run has logged nothing that can be drawn.
    """
    folder = RunFolder.open(run)
    rows = pd.DataFrame(read_metrics(folder.metrics))
    panels = _panels(rows) if len(rows) else {}
    if not panels:
        raise RunError(f"{folder.metrics} has no curve to draw; the run stopped before its first log")
    path = Path(path) if path is not None else folder.figures / "learning_curves.png"
    with _style(dark):
        figure = Figure(figsize=(4.2 * len(panels), 4.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, curves) in zip(axes, panels.items()):
            _draw(axis, title, curves)
        return _save(figure, path)


def _panels(rows: pd.DataFrame) -> dict[str, dict[str, pd.Series[float]]]:
    """The curves of each panel by name, indexed by step; panels without a curve are left out."""
    rows = rows[np.isfinite(rows["value"])]
    curves = {str(n): some.set_index("step")["value"] for n, some in rows.groupby("name", sort=True)}
    panels: dict[str, dict[str, pd.Series[float]]] = {}
    keys = dict.fromkeys(n.split("/")[0] for n in curves if "/val/" in n)
    for name, curve in curves.items():
        last = name.split("/")[-1]
        if last == "loss":
            panels.setdefault("loss", {})[name.removesuffix("/loss").replace("/", " ")] = curve
        elif name.startswith("term/") and last == "weighted":
            panels.setdefault("loss terms, weighted", {})[name.split("/")[1]] = curve
        elif name.startswith("lr-"):
            panels.setdefault("learning rate", {})[name.split("/", 1)[-1]] = curve
    for key in keys:
        scores = [s for s in ("accuracy", "mae") if f"{key}/val/{s}" in curves]
        for score in scores[:1]:
            title = f"validation {label(score)}"
            panels.setdefault(title, {})[key] = curves[f"{key}/val/{score}"]
    order = ("loss", "validation accuracy", "validation mae ↓", "loss terms, weighted", "learning rate")
    return {title: panels[title] for title in order if title in panels}


def _draw(axis: Axes, title: str, curves: dict[str, pd.Series[float]]) -> None:
    free = [c for c in _COLORS if c not in _ROLE_COLORS.values()]
    for i, (name, curve) in enumerate(curves.items()):
        color = _ROLE_COLORS.get(name.split(" ")[0], free[i % len(free)])
        dash = _DASHES[i % len(_DASHES)]
        steps = curve.index.to_numpy() + 1
        if len(curve) > _ROWS_SMOOTHED:
            axis.plot(steps, curve.to_numpy(), color=color, alpha=0.25, linewidth=0.8)
            curve = curve.ewm(span=len(curve) / 20).mean()
        marker = "o" if len(curve) <= 20 else ""
        axis.plot(steps, curve.to_numpy(), dash, color=color, marker=marker, markersize=3.5, label=name)
    axis.set_title(title, loc="left")
    axis.set_xlabel("optimizer step")
    axis.margins(x=0.02)
    if title == "learning rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2 if len(curves) < 9 else 3)


def tradeoff(runs: pd.DataFrame, path: Path | str, *, title: str = "", dark: bool = False) -> Path:
    """Draw one point an arm: what the source retains (x) against what the target gains (y).

    Both with their 95 % intervals over seeds; the line joins the arms that no other arm beats in both (Pareto). With
    several sources or targets a run counts with their mean. Where no run knows these, it is the metric after.

    Args:
        runs: finished runs of one experiment, source and target (``crossft.reports.records.groups``).
        path: the PNG to write.
        title: heading of the picture.
        dark: light lines on dark.

    Returns:
        The picture's path.

    Raises:
        RunError: no arm has both values.
    """
    found = tradeoff_of(runs)
    if found is None:
        raise RunError("no finished run has both a source and a target metric: there is nothing to draw")
    points = found.points
    with _style(dark):
        figure = Figure(figsize=(7.6, max(4.6, 0.9 + 0.27 * len(points))), layout="constrained")
        axis = figure.subplots()
        _scatter(axis, found, _INK[dark][0])
        axis.set_xlabel(found.x_label)
        axis.set_ylabel(found.y_label)
        axis.set_title(title, loc="left")
        return _save(figure, Path(path))


def _scatter(axis: Axes, found: Tradeoff, ink: str) -> None:
    points, front = found.points, found.front
    means = {arm: (x.mean, y.mean) for arm, (x, y) in points.items()}
    axis.plot(*zip(*(means[arm] for arm in front)), "-", color=ink, alpha=0.45, linewidth=1.2, zorder=1)
    order = sorted(range(len(means)), key=lambda i: (-1 if found.y_up else 1) * list(means.values())[i][1])
    items = list(points.items())
    for i in order:
        arm, (x, y) = items[i]
        marker, color = _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)], _COLORS[i % len(_COLORS)]
        halves = [None if np.isnan(v.half) else v.half for v in (x, y)]
        axis.errorbar(x.mean, y.mean, halves[1], halves[0], fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5)
        name = arm + (" *" if arm in front else "")
        axis.plot(x.mean, y.mean, marker, color=color, markersize=7, markeredgewidth=0, label=name)
    axis.margins(0.06)
    heading = "* no arm is better in both" + ("\n± 95 % over seeds" if any(x.n > 1 for x, _ in points.values()) else "")
    legend = axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title=heading, alignment="left")
    legend.get_title().set_fontsize(8)


def frontier_picture(
    lines: Mapping[str, Sequence[tuple[str, Interval, Interval, bool]]], path: Path | str, *, title: str = ""
) -> Path:
    """Draw each method's strengths as a line: source retention (x) against target gain (y), with the common front.

    What lies far from all others stands at the edge with its values, so that the others can be told apart.

    Args:
        lines: by method, its points in order: strength, retention, gain, and whether it is on the front of all.
        path: the PNG to write.
        title: heading of the picture.

    Returns:
        The picture's path.
    """
    with _style(False):
        figure = Figure(figsize=(7.6, max(4.6, 1.2 + 0.27 * len(lines))), layout="constrained")
        axis = figure.subplots()
        front = sorted((x.mean, y.mean) for points in lines.values() for _, x, y, on in points if on)
        axis.plot(*zip(*front), "-", color=_INK[False][0], alpha=0.25, linewidth=5, solid_joinstyle="round", zorder=1)
        every = [point for points in lines.values() for point in points]
        (left, right), (bottom, top) = _most([p[1].mean for p in every]), _most([p[2].mean for p in every])
        for i, (method, points) in enumerate(lines.items()):
            marker, color = _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)], _COLORS[i % len(_COLORS)]
            both = [(x, y) for _, x, y, _ in points]
            xs, ys = ([v.mean for v in side] for side in zip(*both))
            halves = [[0.0 if np.isnan(v.half) else v.half for v in side] for side in zip(*both)]
            axis.errorbar(
                xs,
                ys,
                halves[1],
                halves[0],
                fmt="none",
                ecolor=color,
                elinewidth=0.8,
                alpha=0.3 if len(lines) <= 12 else 0.12,
            )
            dash = _DASHES[i % len(_DASHES)]
            axis.plot(xs, ys, dash, marker=marker, color=color, markersize=6, markeredgewidth=0, label=method)
            for strength, x, y, _ in points:
                text, at = strength.rpartition("=")[2], (x.mean, y.mean)
                edge = (min(max(at[0], left), right), min(max(at[1], bottom), top))
                if edge != at:
                    axis.plot(*edge, marker=marker, color=color, markersize=6, markeredgewidth=0, clip_on=False)
                    text = f"{text} ({x.mean:.2f}, {y.mean:.2f})".strip()
                side = "right" if at[0] > right else "left"
                offset = (-4 if side == "right" else 4, 4)
                turn = 0 if edge[1] == at[1] else 90
                axis.annotate(
                    text, edge, offset, textcoords="offset points", ha=side, rotation=turn, fontsize=6.5, color=color
                )
        axis.set_xlabel("source retention: after / before")
        axis.set_ylabel("target gain: after - before")
        axis.set_title(title, loc="left")
        axis.set(xlim=(left, right), ylim=(bottom, top))
        several = any(x.n > 1 for points in lines.values() for _, x, _, _ in points)
        heading = "by hypervolume\nband: no point is better in both" + ("\n± 95 % over seeds" if several else "")
        legend = axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title=heading, alignment="left")
        legend.get_title().set_fontsize(8)
        return _save(figure, Path(path))


def _most(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis: of all values but those more than three interquartile ranges outside the middle half."""
    low, high = np.quantile(values, (0.25, 0.75))
    room = 3.0 * max(high - low, 0.02)
    inside = [v for v in values if low - room <= v <= high + room]
    margin = 0.08 * max(max(inside) - min(inside), 0.02)
    return min(inside) - margin, max(inside) + margin
