"""Arms over several tasks: one table an experiment whose runs have several sources or targets, with mean ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from crossft.reports.records import groups, headline, leaves, with_baseline
from crossft.reports.stats import Interval, interval
from crossft.reports.tables import ArmTable, Cell, compared, counted, power, run_counts
from crossft.runs import higher_is_better

__all__ = ["RANK", "overall"]

RANK = "mean rank"
"""The column of ranks: 1 for the arm whose mean of the first metric is the best of a task, averaged over tasks."""


def overall(records: pd.DataFrame, baseline: str | None = None, metrics: Sequence[str] | None = None) -> list[ArmTable]:
    """Compare arms over tasks; a task is a pair of source and target. Experiments of one task have no such table.

    A value is a seed's mean over all tasks, its interval is over seeds; an arm without a seed that finished every task
    has none. Differences to the baseline are paired by task, averaged over the tasks of a seed, and tested over seeds:
    the tasks of a seed share its source model and draws, so they are no independent pairs.

    Args:
        records: from ``read_records``.
        baseline: the arm to compare with; None for no comparison.
        metrics: keys of the columns; by default the headline, as far as every task has it.
    """
    tables = []
    for experiment, runs in leaves(records).groupby("experiment", sort=False):
        found = {title: counted(some) for title, some in groups(runs)}
        tasks = {title: some for title, some in found.items() if len(some)}
        if len(tasks) > 1:
            table = _table(str(experiment), runs, tasks, baseline, metrics)
            if lost := [title for title in found if title not in tasks]:
                table.notes.insert(0, f"Left out, as no run of it finished: {'; '.join(lost)}.")
            tables.append(table)
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
        _notes(tasks, cells, chosen, baseline),
    )


def _column(tasks: dict[str, pd.DataFrame], arms: list[str], metric: str, baseline: str | None) -> dict[str, Cell]:
    return compared({arm: _means(tasks, arm, metric) for arm in arms}, arms, metric, baseline)


def _means(tasks: dict[str, pd.DataFrame], arm: str, metric: str) -> dict[int, float]:
    """By seed, the arm's mean over tasks; of seeds that have them all."""
    seeds: dict[int, list[float]] = {}
    for runs in tasks.values():
        own = runs[(runs["arm"] == arm) & runs[metric].notna()]
        for seed, value in zip(own["seed"], own[metric]):
            seeds.setdefault(int(seed), []).append(float(value))
    return {seed: sum(some) / len(tasks) for seed, some in seeds.items() if len(some) == len(tasks)}


def _ranks(tasks: dict[str, pd.DataFrame], arms: list[str], metric: str) -> dict[str, Cell]:
    """Each arm's mean rank over tasks; arms that lack a task have none. Equal means share the mean of their ranks."""
    means = pd.DataFrame({name: runs.groupby("arm")[metric].mean() for name, runs in tasks.items()}).reindex(arms)
    ranks = means.dropna().rank(ascending=not higher_is_better(metric))
    found = ranks.mean(axis=1)
    nan = float("nan")
    seeds = {arm: len(_means(tasks, arm, metric)) for arm in arms}
    return {arm: Cell(Interval(found[arm], nan, nan, seeds[arm]) if arm in found else interval([])) for arm in arms}


def _notes(
    tasks: dict[str, pd.DataFrame], cells: dict[tuple[str, str], Cell], chosen: Sequence[str], baseline: str | None
) -> list[str]:
    notes = [f"Mean over {len(tasks)} tasks of each seed that finished them all."]
    if baseline is not None:
        notes.append("Differences are paired by task and averaged over the tasks of a seed, as these share its source.")
    notes += power(cells, baseline) or ["± is half of the 95 % Student t interval over seeds."]
    if chosen:
        notes.append(f"Rank 1 is the best mean of {chosen[0]} of a task, among arms that finished every task.")
    return notes
