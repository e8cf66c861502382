"""Arms against metrics: mean ± half of the 95 % interval over seeds, marked where it differs from the baseline.

Beside each such table stand its statistics: standard deviations, differences to the baseline, p values, effect sizes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crossft.errors import ConfigError
from crossft.reports.records import groups, headline, leaves, with_baseline
from crossft.reports.stats import Comparison, Interval, compare_paired, holm, interval, smallest_p
from crossft.runs import higher_is_better

__all__ = [
    "ALPHA",
    "METHODS",
    "ArmTable",
    "Cell",
    "arm_table",
    "compare",
    "compared",
    "counted",
    "label",
    "power",
    "run_counts",
    "text_of",
]

ALPHA = 0.05
METHODS = (
    "sd: standard deviation over seeds (n - 1). ±: half of the 95 % Student t interval. difference: arm - baseline, "
    "paired. p: two-sided paired sign-flip permutation test, exact up to 12 pairs, else 20,000 draws. p Holm: over the "
    "arms of the metric. d_z: Cohen's d of paired differences; g: d_z with Hedges' correction."
)
"""What the columns of the statistics are."""
_STATISTICS = ("metric", "arm", "mean", "sd", "±", "n", "difference", "±", "pairs", "p", "p Holm", "d_z", "g")
_CSV: tuple[str, ...] = ("group", "arm", "metric", "mean", "half", "sd", "n")
_CSV += ("difference", "difference_half", "pairs", "p", "p_holm", "d_z", "g")


def label(metric: str) -> str:
    """A metric's key as a heading: ``target/test/accuracy`` becomes ``target accuracy``; ↓ where lower is better."""
    parts = [part for part in metric.split("/") if part != "test"]
    relative = parts[-1] in ("gain", "retention")
    return " ".join(parts).replace("_", " ") + ("" if relative or higher_is_better(metric) else " ↓")


@dataclass(frozen=True)
class Cell:
    """One arm and metric: the mean over seeds, and the comparison with the baseline where there is one."""

    value: Interval
    comparison: Comparison | None = None
    p_holm: float = float("nan")
    better: bool | None = None
    """True or False where the difference is significant after Holm, None where it is not."""


@dataclass(frozen=True)
class ArmTable:
    """Arms by metrics. Marks stand only where p < 0.05 after Holm's correction over the arms of the metric's column.

    Attributes:
        title: experiment, source and target.
        metrics: keys of the columns.
        runs: for each arm, in order, how many runs finished, and what became of the others.
        cells: by (arm, metric).
        baseline: the arm that others are compared with, or None.
        notes: what a reader must know, one sentence each.
    """

    title: str
    metrics: tuple[str, ...]
    runs: dict[str, str]
    cells: dict[tuple[str, str], Cell]
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows as text: arm, runs, then one cell a metric."""
        for arm, runs in self.runs.items():
            name = f"{arm} (baseline)" if arm == self.baseline else arm
            seeds = max((self.cells[arm, m].value.n for m in self.metrics), default=0)
            yield [name, runs, *(_text(self.cells[arm, m], seeds) for m in self.metrics)]

    def heads(self) -> list[str]:
        """The columns' headings."""
        return ["arm", "runs", *map(label, self.metrics)]

    def statistics(self) -> Iterator[list[str]]:
        """Yield one row an arm and metric, as text under ``statistics_heads``; see ``METHODS``."""
        columns = len(self.statistics_heads())
        for metric in self.metrics:
            for arm in self.runs:
                yield [label(metric), arm, *_numbers(self.cells[arm, metric])][:columns]

    def statistics_heads(self) -> list[str]:
        """The headings of the statistics; without a baseline there are no differences."""
        return [*_STATISTICS[: 6 if self.baseline is None else None]]

    def rich(self) -> Table:
        """For the terminal."""
        notes = Text("\n".join(self.notes))
        table = Table(title=Text(self.title), caption=notes, caption_justify="left", box=SIMPLE_HEAD)
        table.padding = (0, 1, 0, 0)
        table.add_column("arm", min_width=10, overflow="fold")
        table.add_column("runs", overflow="fold")
        for metric in self.metrics:
            table.add_column(Text("\n".join(label(metric).split(" ", 1))), justify="right", min_width=8)
        for row in self.rows():
            table.add_row(*map(Text, row))
        return table

    def rich_statistics(self) -> Group:
        """The statistics for the terminal, a table a metric."""
        parts: list[RenderableType] = [Text(f"{self.title}: statistics", style="bold")]
        for metric in self.metrics:
            table = Table(title=Text(label(metric)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            table.add_column("arm", min_width=8, overflow="fold")
            heads = ("mean", "sd", "n", "difference", "p", "p Holm", "g")
            for head in heads[: 3 if self.baseline is None else None]:
                table.add_column(head, justify="right", no_wrap=True)
            for arm in self.runs:
                table.add_row(arm, *_brief(self.cells[arm, metric])[: len(table.columns) - 1])
            parts.append(table)
        return Group(*parts, Text(METHODS))

    def markdown(self) -> str:
        """As Markdown tables, the notes below the first and the statistics after them."""
        first = _markdown(self.heads(), self.rows(), texts=2)
        second = _markdown(self.statistics_heads(), self.statistics(), texts=2)
        return "\n\n".join([f"**{self.title}**", first, *self.notes, second, METHODS]) + "\n"

    def latex(self) -> str:
        """As two ``tabular`` that need ``booktabs``; the marks are + and - superscripts."""
        first = _tabular(self.heads(), self.rows(), self.notes)
        return f"{first}\n{_tabular(self.statistics_heads(), self.statistics(), [METHODS])}"

    def lines(self) -> Iterator[list[object]]:
        """Yield one line an arm and metric, at full precision."""
        for (arm, metric), cell in self.cells.items():
            mean, sd, half, n = cell.value
            line: list[object] = [self.title, arm, metric, mean, half, sd, n]
            if cell.comparison is not None:
                c = cell.comparison
                line += [c.difference.mean, c.difference.half, c.difference.n, c.p, cell.p_holm, c.d_z, c.g]
            padded = line + [""] * (len(_CSV) - len(line))
            yield ["" if isinstance(v, float) and math.isnan(v) else v for v in padded]


def text_of(tables: Sequence[ArmTable], form: Literal["markdown", "latex", "csv"]) -> str:
    """The tables as one text; CSV has one head, and the title of a table in its column ``group``."""
    if form != "csv":
        return "\n".join(getattr(table, form)() for table in tables)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    writer.writerows(line for table in tables for line in table.lines())
    return text.getvalue()


def _text(cell: Cell, seeds: int) -> str:
    mean, _, half, n = cell.value
    if not n:
        return "—"
    digits = 3 if abs(mean) < 10 else 1
    text = f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
    text += f" (n={n})" if n != seeds else ""
    return text if cell.better is None else f"{text} {'▲' if cell.better else '▼'}"


def _numbers(cell: Cell) -> list[str]:
    (mean, sd, half, n), c = cell.value, cell.comparison
    shown = [_number(mean), _number(sd), _number(half), str(n)]
    if c is None:
        return shown + [""] * 7
    difference = [_number(c.difference.mean, "+"), _number(c.difference.half), str(c.difference.n)]
    return [*shown, *difference, _number(c.p), _number(cell.p_holm), _number(c.d_z, "+"), _number(c.g, "+")]


def _brief(cell: Cell) -> list[str]:
    """The same in fewer columns and digits: mean, sd, n, difference, p, p Holm, g."""
    (mean, sd, half, n), c = cell.value, cell.comparison
    shown = [_with_half(mean, half), _number(sd, digits=3), str(n)]
    if c is None:
        return shown + [""] * 4
    difference = _with_half(c.difference.mean, c.difference.half, "+")
    difference += f" ({c.difference.n} pairs)" if c.difference.n != n else ""
    return [*shown, difference, _number(c.p), _number(cell.p_holm), _number(c.g, "+", 2)]


def _with_half(mean: float, half: float, sign: str = "") -> str:
    return _number(mean, sign, 3) + ("" if math.isnan(half) else f" ± {_number(half, digits=3)}")


def _number(value: float, sign: str = "", digits: int = 4) -> str:
    return "—" if math.isnan(value) else f"{value:{sign}.{digits if abs(value) < 10 else 1}f}"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    lines = [heads, [":--"] * texts + ["--:"] * (len(heads) - texts), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _tabular(heads: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [" & ".join(map(_latex, heads)) + r" \\ \midrule"]
    lines += [" & ".join(map(_latex, row)).replace(" $^", "$^") + r" \\" for row in rows]
    top = "".join(f"% {note}\n" for note in notes)
    columns, body = "ll" + "r" * (len(heads) - 2), "\n".join(lines)
    return f"{top}\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "—": "--"}
    special |= {c: "\\" + c for c in "&%$#_{}"} | {"→": r"$\to$", "↓": r"$\downarrow$"}
    special |= {"±": r"$\pm$", "▲": "$^{+}$", "▼": "$^{-}$"}
    return "".join(special.get(c, c) for c in text)


def compare(records: pd.DataFrame, baseline: str | None = None, metrics: Sequence[str] | None = None) -> list[ArmTable]:
    """Compare arms: one table for each experiment, source and target.

    Runs that others start from (source legs) are left out. Arms stand in order of their folders, the baseline first.

    Args:
        records: from ``read_records``.
        baseline: the arm to compare with; None for no comparison.
        metrics: keys of the columns; by default the headline of each group.

    Raises:
        ConfigError: no run belongs to ``baseline``, or no run has a metric of ``metrics``.
    """
    records = leaves(records)
    arms = list(dict.fromkeys(records["arm"]))
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"baseline={baseline!r} is not an arm of these runs; they have {', '.join(arms)}")
    unknown = [m for m in metrics or () if m not in records.columns]
    if unknown:
        known = ", ".join(c for c in records.columns if "/" in c)
        raise ConfigError(f"metrics: no run has {unknown[0]!r}; they have {known}")
    return [arm_table(runs, title, baseline, metrics) for title, runs in groups(records)]


def arm_table(
    runs: pd.DataFrame, title: str, baseline: str | None = None, metrics: Sequence[str] | None = None
) -> ArmTable:
    """The table of one group of comparable runs; see ``compare``. Only finished runs enter a mean."""
    finished = counted(runs)
    notes = _notes(runs) + _baselines(runs)
    if len(finished) < (runs["status"] == "finished").sum():
        notes.append("Some arms have several runs of one seed; the newest counts.")
    if baseline is not None and not (finished["arm"] == baseline).any():
        notes.append(f"No run of the baseline {baseline} finished here: nothing is compared.")
        baseline = None
    own = finished
    finished = own if baseline is None else with_baseline(own, baseline)
    chosen = tuple(metrics or headline(finished))
    if any(finished[m].count() > (own[m].count() if m in own else 0) for m in chosen):
        notes.append(f"Where a run has no metric before fine-tuning, gain and retention are against {baseline}.")
    arms = sorted(dict.fromkeys(runs["arm"]), key=lambda arm: arm != baseline)
    cells: dict[tuple[str, str], Cell] = {}
    for metric in chosen:
        cells |= {(arm, metric): cell for arm, cell in _column(finished, arms, metric, baseline).items()}
    notes += power(cells, baseline)
    counts = {arm: run_counts(runs.loc[runs["arm"] == arm, "status"]) for arm in arms}
    ordered = {(arm, metric): cells[arm, metric] for arm in arms for metric in chosen}
    return ArmTable(title, chosen, counts, ordered, baseline, notes)


def counted(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs, of several with one arm and seed the newest."""
    finished = runs[runs["status"] == "finished"].sort_values("written", kind="stable")
    return finished.drop_duplicates(["arm", "seed"], keep="last").sort_index()


def _column(finished: pd.DataFrame, arms: list[str], metric: str, baseline: str | None) -> dict[str, Cell]:
    values: dict[str, dict[int, float]] = {
        str(arm): dict(zip(some["seed"], some[metric])) for arm, some in finished.groupby("arm") if metric in finished
    }
    return compared(values, arms, metric, baseline)


def compared(
    values: Mapping[str, Mapping[int, float]], arms: Sequence[str], metric: str, baseline: str | None
) -> dict[str, Cell]:
    """One metric's cell of each arm.

    Args:
        values: by arm and seed.
        arms: all of them, also those without a value.
        metric: its key, which says whether higher is better.
        baseline: the arm that others are compared with, or None.
    """
    found = {arm: interval(list(values.get(arm, {}).values())) for arm in arms}
    if baseline is None:
        return {arm: Cell(found[arm]) for arm in arms}
    others = [arm for arm in arms if arm != baseline]
    comparisons = [compare_paired(values.get(arm, {}), values.get(baseline, {})) for arm in others]
    adjusted = holm([c.p if c is not None else float("nan") for c in comparisons])
    up = higher_is_better(metric)
    cells = {baseline: Cell(found[baseline])} if baseline in found else {}
    for arm, comparison, p in zip(others, comparisons, adjusted):
        better = (comparison.difference.mean > 0) == up if comparison is not None and p < ALPHA else None
        cells[arm] = Cell(found[arm], comparison, p, better)
    return cells


def run_counts(status: pd.Series[str]) -> str:
    """How many runs finished, and what became of the others: ``8, 1 failed``."""
    counts = status.value_counts()
    finished = int(counts.pop("finished")) if "finished" in counts else 0
    return f"{finished}" + "".join(f", {n} {name}" for name, n in counts.items())


def _notes(runs: pd.DataFrame) -> list[str]:
    shared = runs[runs["parent"].notna()].groupby(["arm", "parent"])["seed"].nunique()
    if (shared > 1).any():
        return ["Seeds of an arm share their source model: the intervals are conditional on it."]
    return []


def _baselines(runs: pd.DataFrame) -> list[str]:
    """What ``crossft baseline`` has written into the runs' summaries."""
    keys = [c for c in runs.columns if c.startswith("baseline/") and runs[c].notna().any()]
    texts = [f"{key.split('/')[2]} {label(key.split('/', 2)[2]).split()[-1]} {runs[key].mean():.3f}" for key in keys]
    names = {"tfidf": "TF-IDF with logistic regression", "frozen": "logistic regression on frozen features"}
    by_name: dict[str, list[str]] = {}
    for key, text in zip(keys, texts):
        by_name.setdefault(names.get(key.split("/")[1], key.split("/")[1]), []).append(text)
    return [f"Beside them, {name}: {', '.join(found)}." for name, found in by_name.items()]


def power(cells: dict[tuple[str, str], Cell], baseline: str | None) -> list[str]:
    """What ± and the marks mean, and whether any mark is possible; nothing without a baseline."""
    if baseline is None:
        return []
    note = "± is half of the 95 % Student t interval over seeds; "
    note += f"▲ better, ▼ worse than {baseline}, p < {ALPHA} after Holm."
    pairs = max((c.comparison.difference.n for c in cells.values() if c.comparison is not None), default=0)
    arms = len({arm for (arm, _), cell in cells.items() if cell.comparison is not None})
    if arms and smallest_p(pairs) * arms >= ALPHA:
        needed = next(n for n in range(2, 64) if smallest_p(n) * arms < ALPHA)
        note += f" With {pairs} paired seeds no mark is possible; {needed} are needed for {arms} arms."
    return [note]
