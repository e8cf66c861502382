"""Arms over several tasks: one table an experiment whose runs have several sources or targets, with mean ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from crossft.reports.records import groups, headline, leaves, with_baseline
from crossft.reports.stats import compare_paired, holm, interval
from crossft.reports.tables import ALPHA, ArmTable, Cell, counted, run_counts
from crossft.runs import higher_is_better

__all__ = ["RANK", "overall"]

RANK = "mean rank"
"""The column of ranks: 1 for the arm whose mean of the first metric is the best of a task, averaged over tasks."""


def overall(records: pd.DataFrame, baseline: str | None = None, metrics: Sequence[str] | None = None) -> list[ArmTable]:
    """Compare arms over tasks; a task is a pair of source and target. Experiments of one task have no such table.

    A value is a seed's mean over all tasks, its interval is over seeds; an arm without a seed that finished every task
    has none. Differences to the baseline are paired by seed and task, so the test speaks of these tasks alone.

    Args:
        records: from ``read_records``.
        baseline: the arm to compare with; None for no comparison.
        metrics: keys of the columns; by default the headline, as far as every task has it.
    """
    tables = []
    for experiment, runs in leaves(records).groupby("experiment", sort=False):
        tasks = {title: counted(some) for title, some in groups(runs)}
        tasks = {title: some for title, some in tasks.items() if len(some)}
        if len(tasks) > 1:
            tables.append(_table(str(experiment), runs, tasks, baseline, metrics))
    return tables


def _table(
    title: str, runs: pd.DataFrame, tasks: dict[str, pd.DataFrame], baseline: str | None, metrics: Sequence[str] | None
) -> ArmTable:
    if baseline is not None:
        tasks = {name: with_baseline(some, baseline) for name, some in tasks.items()}
    chosen = [m for m in metrics or headline(next(iter(tasks.values()))) if all(m in some for some in tasks.values())]
    arms = sorted(dict.fromkeys(runs["arm"]), key=lambda arm: arm != baseline)
    columns = {metric: _column(tasks, arms, metric, baseline) for metric in chosen}
    if chosen:
        columns[RANK] = _ranks(tasks, arms, chosen[0])
    cells = {(arm, metric): column[arm] for arm in arms for metric, column in columns.items()}
    counts = {arm: run_counts(runs.loc[runs["arm"] == arm, "status"]) for arm in arms}
    return ArmTable(
        f"{title}: over {len(tasks)} tasks",
        tuple(columns),
        counts,
        cells,
        baseline,
        _notes(tasks, chosen, baseline),
    )


def _column(tasks: dict[str, pd.DataFrame], arms: list[str], metric: str, baseline: str | None) -> dict[str, Cell]:
    values = {arm: _values(tasks, arm, metric) for arm in arms}
    found = {arm: interval(_means(values[arm], len(tasks))) for arm in arms}
    if baseline is None:
        return {arm: Cell(found[arm]) for arm in arms}
    others = [arm for arm in arms if arm != baseline]
    compared = [compare_paired(values[arm], values.get(baseline, {})) for arm in others]
    adjusted = holm([c.p if c is not None else float("nan") for c in compared])
    cells = {baseline: Cell(found[baseline])} if baseline in found else {}
    for arm, comparison, p in zip(others, compared, adjusted):
        up = higher_is_better(metric)
        better = (comparison.difference.mean > 0) == up if comparison is not None and p < ALPHA else None
        cells[arm] = Cell(found[arm], comparison, p, better)
    return cells


def _values(tasks: dict[str, pd.DataFrame], arm: str, metric: str) -> dict[tuple[str, int], float]:
    """The arm's values by task and seed."""
    found: dict[tuple[str, int], float] = {}
    for name, runs in tasks.items():
        own = runs[(runs["arm"] == arm) & runs[metric].notna()]
        found |= {(name, int(seed)): float(value) for seed, value in zip(own["seed"], own[metric])}
    return found


def _means(values: dict[tuple[str, int], float], tasks: int) -> list[float]:
    """The mean over tasks of each seed that has them all."""
    seeds: dict[int, list[float]] = {}
    for (_, seed), value in values.items():
        seeds.setdefault(seed, []).append(value)
    return [sum(some) / tasks for some in seeds.values() if len(some) == tasks]


def _ranks(tasks: dict[str, pd.DataFrame], arms: list[str], metric: str) -> dict[str, Cell]:
    """Each arm's mean rank over tasks; arms that lack a task have none. Equal means share the mean of their ranks."""
    means = pd.DataFrame({name: runs.groupby("arm")[metric].mean() for name, runs in tasks.items()}).reindex(arms)
    ranks = means.dropna().rank(ascending=not higher_is_better(metric))
    found = dict(zip(ranks.index, ranks.to_numpy().tolist()))
    return {arm: Cell(interval(found.get(arm, []))) for arm in arms}


def _notes(tasks: dict[str, pd.DataFrame], chosen: Sequence[str], baseline: str | None) -> list[str]:
    notes = [f"Mean over {len(tasks)} tasks of each seed that finished them all; ± is half of the 95 % interval."]
    if baseline is not None:
        notes[0] += (
            f" ▲ better, ▼ worse than {baseline} on these tasks, paired by seed and task, p < {ALPHA} after Holm."
        )
    if chosen:
        notes.append(f"Rank 1 is the best mean of {chosen[0]} of a task, among arms that finished every task.")
    return notes
