"""Learning rates of a run before it runs: the real schedule over the real groups and phases, without a model's work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from crossft.callbacks.freezing import Phase
from crossft.callbacks.freezing.phases import planned_steps
from crossft.optim import Phased, set_rates_
from crossft.runs import replacing
from crossft.tasks import Task

__all__ = ["draw_rates", "dry_rates"]


def dry_rates(task: Task, plan: Sequence[Phase], total: int, steps_per_epoch: int) -> dict[str, list[float]]:
    """Learning rate of every group at every optimizer step; NaN where none of its parameters trains.

    A phase that ends on patience is taken to last as short as it can: one validation an epoch, none better than the
    first. A metric that the schedule follows is taken not to move.

    Args:
        task: changed: it ends in the last phase, with a schedule of phases.
        plan: the phases; empty where the task stays as it is.
        total: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one epoch.
    """
    optimizer = torch.optim.SGD(task.named_groups())
    schedule = task.schedule = Phased(getattr(task.schedule, "base", task.schedule))
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
    rates: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    waiting, ends = list(plan), 0
    for step in range(total):
        if waiting and step == ends:
            phase = waiting.pop(0)
            phase.apply(task)
            length = planned_steps(phase, step, total, steps_per_epoch)
            schedule.begin(step, length, phase.rates, phase.warmup, phase.lr)
            set_rates_(optimizer, schedule(step, total))
            shortest = phase.patience and (phase.patience + 1) * steps_per_epoch - step % steps_per_epoch
            ends = step + (shortest or length)
        for group in optimizer.param_groups:
            trains = any(p.requires_grad for p in group["params"])
            rates[group["name"]].append(float(group["lr"]) if trains else math.nan)
        optimizer.step()
        scheduler.step()
    return rates


def draw_rates(rates: dict[str, list[float]], path: Path) -> Path:
    """Draw the learning rates over the optimizer steps, one line a stage; a PNG, written whole."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    stages: dict[str, list[float]] = {}
    for name, values in rates.items():  # a stage's two groups share one learning rate; either may train alone
        former = stages.setdefault(name.rpartition("/")[0], values)
        stages[name.rpartition("/")[0]] = [b if math.isnan(a) else a for a, b in zip(former, values)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"]
    for index, (name, values) in enumerate(stages.items()):
        axes.plot(values, label=name, color=colors(index / max(1, len(stages) - 1)), linewidth=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate (where the stage trains)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144, format="png", metadata={"Software": ""})
    return path
