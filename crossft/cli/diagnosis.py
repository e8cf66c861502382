"""After fine-tuning: what the source lost to BatchNorm's statistics, what to the weights, and which remedy fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crossft.backbones.batchnorm import batch_norms, reestimate_
from crossft.cli.weights import load_weights
from crossft.data import DomainData
from crossft.data.passes import one_pass, placed, training_rows
from crossft.metrics import primary_metric
from crossft.metrics.diagnosis import remedy, split_forgetting
from crossft.runs import higher_is_better
from crossft.tasks import Task

__all__ = ["PARTS", "Diagnosis", "diagnose", "sentence"]

PARTS = ("start_statistics", "new_statistics", "own_statistics", "statistics", "weights")
"""The numbers of a diagnosis that stand in ``summary.json``, as ``DOMAIN/batchnorm/PART``."""

_ADVICE = {
    "none": "nothing to mend",
    "weights": "the weights are the cause: hold them (penalties, distillation, replay, WiSE-FT); see configs/methods",
    "frozen": "the statistics are the cause: model.batchnorm=frozen",
    "per_domain": "the statistics are the cause, and the source needs its own: model.batchnorm=per_domain",
}


@dataclass(frozen=True)
class Diagnosis:
    """One domain's values of its primary metric, and what they say.

    Attributes:
        metric: its name.
        before: of the starting model.
        after: of the fine-tuned one.
        start_statistics: of the new weights with the start's statistics put back.
        new_statistics: of the start's weights with the new statistics.
        own_statistics: of the new weights with statistics computed on the domain's training inputs; None for a domain
            that is only measured.
        statistics: part of before - after that is due to the statistics; of an error after - before.
        weights: the rest of it.
        remedy: see ``crossft.metrics.diagnosis.remedy``.
    """

    metric: str
    before: float
    after: float
    start_statistics: float
    new_statistics: float
    own_statistics: float | None
    statistics: float
    weights: float
    remedy: str


def diagnose(
    task: Task,
    data: DomainData,
    init: Path,
    chosen: Path,
    before: Mapping[str, float],
    after: Mapping[str, float],
    measure: Callable[[], Mapping[str, float]],
) -> dict[str, Diagnosis]:
    """Measure the two mixed models, and for each source the new weights with statistics of its own.

    Costs nothing where the statistics did not move: without BatchNorm, with frozen or per-domain statistics. Else it is
    two evaluations, and for each source one pass over its training inputs (labels are not read) and one evaluation.

    Args:
        task: holds the fine-tuned model, before and after.
        data: of the run.
        init: checkpoint of the starting model.
        chosen: checkpoint of the fine-tuned one.
        before: ``DOMAIN/test/METRIC`` of the starting model.
        after: the same of the fine-tuned one.
        measure: evaluates the task as it is on the test splits.

    Returns:
        By domain key, for the domains other than targets that the starting model knew.
    """
    names = task.evaluation.names
    keys = {
        names[d.name]: f"{names[d.name]}/test/{primary_metric(d.kind).name}" for d in task.domains if d.role != "target"
    }
    keys = {name: key for name, key in keys.items() if key in before and key in after}
    if task.batchnorm not in ("training", "reestimated", "reestimated_source") or not keys:
        return {}
    new = _statistics(task)
    load_weights(task, init)
    start = _statistics(task)
    if all(torch.equal(a, b) for a, b in zip(start, new)):
        load_weights(task, chosen)
        return {}
    _put(task, new)
    mixed = measure()
    load_weights(task, chosen)
    _put(task, start)
    back = measure()
    own = _own_statistics(task, data, keys, measure)
    load_weights(task, chosen)
    return {
        name: _diagnosis(key, before[key], after[key], back[key], mixed[key], own.get(name))
        for name, key in keys.items()
    }


def _diagnosis(key: str, before: float, after: float, back: float, mixed: float, own: float | None) -> Diagnosis:
    up = higher_is_better(key)
    sign = 1.0 if up else -1.0
    split = split_forgetting(before, after, back, mixed, up)
    choice = remedy(split, before, sign * back, None if own is None else sign * own)
    return Diagnosis(key.rpartition("/")[2], before, after, back, mixed, own, *split, choice)


def _own_statistics(
    task: Task, data: DomainData, keys: Mapping[str, str], measure: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """Each source under the new weights and statistics computed on its own training inputs."""
    data.bind(task.backbone.input_spec)
    found: dict[str, float] = {}
    names, here = task.evaluation.names, _statistics(task)
    sources = {n: d for n, d in enumerate(task.domains) if d.role == "source" and names[d.name] in keys}
    rows = training_rows(data, "source") if sources else {}
    for number, domain in sources.items():
        if number in rows:
            batches = one_pass(data, {number: rows[number]})
            reestimate_(task.backbone, (placed(batch, task.backbone).inputs for batch in batches))
            found[names[domain.name]] = measure()[keys[names[domain.name]]]
            _put(task, here)
    return found


def _statistics(task: Task) -> list[Tensor]:
    """Copies of all running means and variances, in order."""
    layers = batch_norms(task.backbone)
    return [b.detach().clone() for m in layers for b in (m.running_mean, m.running_var) if b is not None]


@torch.no_grad()
def _put(task: Task, values: list[Tensor]) -> None:
    layers = batch_norms(task.backbone)
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def sentence(name: str, found: Diagnosis) -> str:
    """What to print of one domain."""
    advice = "; ".join(_ADVICE[part] for part in found.remedy.split("+"))
    own = "" if found.own_statistics is None else f", with its own {found.own_statistics:.3f}"
    return (
        f"{name} {found.metric}: {found.before:.3f} before, {found.after:.3f} after; with the start's BatchNorm "
        f"statistics {found.start_statistics:.3f}{own}. Forgotten by statistics {found.statistics:+.3f}, by weights "
        f"{found.weights:+.3f}: {advice}"
    )
