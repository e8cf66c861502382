"""Which checkpoint a run is measured with: what may choose it, and what an oracle would have chosen."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from crossft.callbacks.monitoring.oracle import recorded, remove_recorded
from crossft.callbacks.monitoring.scores import Scores, score_keys
from crossft.data import DomainData
from crossft.errors import ConfigError, RunError
from crossft.metrics import domain_metrics, primary_metric
from crossft.runs import RunFolder, gain, higher_is_better, read_metrics, write_atomic
from crossft.tasks import Task
from crossft.tasks.evaluation import display_names
from crossft.types import Domain

__all__ = [
    "checked_metric",
    "oracle_folder",
    "oracle_metrics",
    "remove_oracle_files",
    "scores_followed",
    "validation_metrics",
]


def validation_metrics(domains: Sequence[Domain], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every metric that a validation of these domains can give: of those with labels there, and scores without labels.

    Args:
        domains: of the run.
        rows: what ``DomainData.describe`` says of them.
    """
    names, labeled = display_names(domains), {row["domain"] for row in rows if row["val_labels"]}
    known = [
        f"{names[d.name]}/val/{name}"
        for d in domains
        if d.name in labeled
        for name in ("loss", *domain_metrics(d, sync=False).keys())
    ]
    return [*known, *score_keys(domains, rows)]


def checked_metric(
    key: str, metric: str | None, domains: Sequence[Domain], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """The validation metric that chooses the checkpoint (``select``), or that a search reads (``trial.metric``).

    Args:
        key: which of them.
        metric: its name.
        domains: of the run.
        rows: what ``DomainData.describe`` says of them.

    Raises:
        ConfigError: validation does not measure it.
    """
    if metric is None or (key == "trial.metric" and "/val/" not in metric):
        return None
    known = validation_metrics(domains, rows)
    if metric not in known:
        instead = ", or null for the last checkpoint" if key == "select" else ""
        raise ConfigError(
            f"{key}={metric!r} is not measured in validation; allowed: {', '.join(known) or 'nothing'}{instead}. "
            "A target without validation labels cannot choose by them "
            "(data.validation_from_labels=true takes some of its shots for that)"
        )
    return metric


def scores_followed(
    select: str | None, task: Task, data: DomainData, callbacks: Sequence[Callback], searched: str | None = None
) -> list[Callback]:
    """The callback that logs the label-free scores which selection, callbacks or the schedule follow; none if none do.

    Args:
        select: the metric that chooses the checkpoint.
        task, data: of the run.
        callbacks: all of the run; what they follow is their ``monitor``.
        searched: the metric that a search reads.
    """
    followed = {select, searched, *(getattr(c, "monitor", None) for c in (*callbacks, task.schedule))}
    wanted = {name for key, name in score_keys(task.domains, data.describe()).items() if key in followed}
    for callback in callbacks:
        if isinstance(callback, Scores):
            wanted -= set(wanted if callback.scores is None else callback.scores)
    return [Scores(sorted(wanted))] if wanted else []


# -- the oracle --------------------------------------------------------------------------------------------------


def oracle_folder(folder: RunFolder) -> Path:
    """Where predictions wait until the checkpoint is chosen."""
    return folder.path / "oracle"


def oracle_metrics(
    folder: RunFolder, task: Task, data: DomainData, after: Mapping[str, float], select: str | None
) -> dict[str, float | None]:
    """The best test score that any validated model reached, and by how much the chosen one, or others, miss it.

    Called when the checkpoint is chosen and measured. Writes ``oracle.csv``: the test score of the model at each
    validation.

    Args:
        folder: the run's.
        task: the run's.
        data: the run's, with the labels of the test splits.
        after: the metrics of the chosen model; it is a candidate too.
        select: what chose it.

    Returns:
        For each target: ``oracle/TARGET/test/METRIC``, ``oracle/TARGET/regret`` (0: none is better) and, for every
        other validation metric that was logged, ``oracle/TARGET/regret/METRIC``: the regret, had it chosen instead.
    """
    steps = recorded(oracle_folder(folder))
    names = task.evaluation.names
    found: dict[str, float | None] = {}
    lines: list[tuple[int, str, float]] = []
    for prepared in data.prepared:
        domain = prepared.domain
        metric = primary_metric(domain.kind).name
        key = f"{names[domain.name]}/test/{metric}"
        if domain.role != "target" or key not in after:
            continue
        rows = prepared.rows("test")
        labeled = torch.from_numpy(prepared.labeled[rows])
        targets = torch.from_numpy(prepared.targets[rows])[labeled]
        scores = {step: _score(domain, metric, p[domain.name][labeled], targets) for step, p in steps.items()}
        lines += [(step, key, score) for step, score in scores.items()]
        up = higher_is_better(key)
        best = (max if up else min)([*scores.values(), after[key]])
        found[f"oracle/{key}"] = best
        found[f"oracle/{names[domain.name]}/regret"] = gain(after[key], best, up)
        for name, step in _choices(folder, scores).items():
            if name != select:
                found[f"oracle/{names[domain.name]}/regret/{name}"] = gain(scores[step], best, up)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([("step", "name", "value"), *lines])
    write_atomic(folder.path / "oracle.csv", text.getvalue())
    return found


def _score(domain: Any, metric: str, predictions: Tensor, targets: Tensor) -> float:
    metrics = domain_metrics(domain, sync=False)
    metrics.update(predictions, targets.long() if domain.kind == "multilabel" else targets)
    return float(metrics.compute()[metric])


def _choices(folder: RunFolder, steps: Mapping[int, float]) -> dict[str, int]:
    """Which recorded step each validation metric would have chosen; the first of equals, as checkpoints do."""
    try:
        rows = read_metrics(folder.metrics)
    except RunError:
        return {}
    chosen: dict[str, tuple[float, int]] = {}
    for row in rows:
        step = row.step + 1  # logs count the steps before
        if "/val/" not in row.name or step not in steps or not math.isfinite(row.value):
            continue
        value = row.value if higher_is_better(row.name) else -row.value
        if row.name not in chosen or value > chosen[row.name][0]:
            chosen[row.name] = (value, step)
    return {name: step for name, (_, step) in chosen.items()}


def remove_oracle_files(folder: RunFolder) -> None:
    """Remove the predictions, once their scores are in the summary."""
    remove_recorded(oracle_folder(folder))
