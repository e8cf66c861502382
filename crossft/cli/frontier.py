"""``crossft frontier EXPERIMENT...``: target gain against source retention over each method's strengths; no torch."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossft.cli.screen import print_table
from crossft.errors import ConfigError, RunError
from crossft.runs import write_atomic

if TYPE_CHECKING:
    from crossft.reports.stats import Interval
    from crossft.reports.strengths import Frontier

__all__ = ["run"]

_HEAD: tuple[str, ...] = (
    "group",
    "method",
    "strength",
    "seeds",
    "retention",
    "retention_half",
    "gain",
    "gain_half",
    "front",
)
_HEAD += ("hypervolume", "hypervolume_half")


def run(command: str, arguments: list[str]) -> int:
    """Print one table of methods for each source and target; with ``--output`` write picture and points."""
    parser = argparse.ArgumentParser(
        "crossft frontier",
        description="Target gain against source retention over each method's strengths (a sweep's arms NAME,weight=W, "
        "and the WiSE-FT line of every run with a blends.csv): Pareto front, hypervolume over seeds.",
        epilog="crossft average RUN --output RUN/blends.csv measures a run's WiSE-FT line without training.",
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some (runs/EXPERIMENT)")
    parser.add_argument("--output", type=Path, help="also write the picture (.png) and beside it the points (.csv)")
    options = parser.parse_args(arguments)
    output: Path | None = options.output
    if output is not None and output.suffix != ".png":
        raise ConfigError(f"--output={output}: give the picture's name, ending in .png; the points stand beside it")
    from crossft.reports.figures import frontier_picture
    from crossft.reports.records import groups, leaves, read_records
    from crossft.reports.strengths import frontiers, with_blends

    lines: list[list[object]] = []
    drawn: list[Path] = []
    for title, runs in groups(with_blends(leaves(read_records(options.runs)))):
        try:
            found = frontiers(runs)
        except RunError as error:
            print(f"{title}: {error}")
            continue
        _show(title, found)
        lines += _lines(title, found)
        if output is not None:
            name = output if not drawn else output.with_stem(f"{output.stem}-{len(drawn) + 1}")
            points = {f.method: [(p.strength, p.retention, p.gain, p.front) for p in f.points] for f in found}
            drawn.append(frontier_picture(points, name, title=title))
    if not lines:
        raise RunError("nothing to draw: no group of runs has both target gain and source retention")
    if output is not None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([_HEAD, *lines])
        write_atomic(output.with_suffix(".csv"), text.getvalue())
        print(f"written: {', '.join(map(str, [*drawn, output.with_suffix('.csv')]))}")
    return 0


def _show(title: str, found: Sequence[Frontier]) -> None:
    rows = []
    for one in found:
        kept = [_text(one.best(least)) for least in (0.95, 0.9, 0.0)]
        on = ", ".join(p.strength.rpartition("=")[2] or "yes" for p in one.points if p.front)
        rows.append([one.method, on, str(len(one.points)), _text(one.hypervolume), *kept])
    head = ["method", "on the front", "strengths", "hypervolume", "gain at retention ≥ 0.95", "≥ 0.9", "best gain"]
    print_table(title, head, rows, 2)


def _text(value: Interval | None) -> str:
    if value is None:
        return "—"
    return f"{value.mean:.3f}" + ("" if math.isnan(value.half) else f" ± {value.half:.3f}")


def _lines(title: str, found: Sequence[Frontier]) -> list[list[object]]:
    lines: list[list[object]] = []
    for one in found:
        volume = (one.hypervolume.mean, one.hypervolume.half)
        for p in one.points:
            x, y = p.retention, p.gain
            line = [title, one.method, p.strength, x.n, x.mean, x.half, y.mean, y.half, int(p.front), *volume]
            lines.append(["" if isinstance(v, float) and math.isnan(v) else v for v in line])
    return lines
