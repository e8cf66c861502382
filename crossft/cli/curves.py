"""Learning rates of a run before it runs: the real schedule over the real groups and phases, without a model's work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from crossft.callbacks.freezing import Phase
from crossft.callbacks.freezing.course import Course, earliest_starts
from crossft.callbacks.freezing.phases import planned_steps
from crossft.optim import Phased, set_rates_
from crossft.runs import replacing
from crossft.tasks import Task

__all__ = ["begin_phase", "draw_rates", "dry_rates", "lines_of"]


def begin_phase(task: Task, phase: Phase, start: int, course: Course) -> Phased:
    """Put the task's schedule at the beginning of a phase, as ``GradualUnfreezing`` does, and return it."""
    schedule = task.schedule = Phased(getattr(task.schedule, "base", task.schedule))
    length = planned_steps(phase, start, course.total, course.steps_per_epoch)
    schedule.begin(start, length, phase.rates, phase.warmup, phase.lr)
    return schedule


def dry_rates(task: Task, plan: Sequence[Phase], course: Course) -> dict[str, list[float]]:
    """Learning rate of every group at every optimizer step; NaN where none of its parameters trains.

    A phase that ends on patience is taken to last as short as it can: no validation is better than its first. A
    metric that the schedule follows is taken not to move.

    Args:
        task: changed: it ends in the last phase that is entered, with a schedule of phases.
        plan: the phases; empty where the task stays as it is.
        course: steps and validations of the run.
    """
    optimizer = torch.optim.SGD(task.named_groups())
    task.schedule = Phased(getattr(task.schedule, "base", task.schedule))
    scheduler = LambdaLR(optimizer, lambda step: task.schedule(step, course.total))
    rates: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    starts = dict(zip(earliest_starts(plan, course), plan))
    for step in range(course.total):
        if (phase := starts.get(step)) is not None:
            phase.apply(task)
            set_rates_(optimizer, begin_phase(task, phase, step, course)(step, course.total))
        for group in optimizer.param_groups:
            trains = any(p.requires_grad for p in group["params"])
            rates[group["name"]].append(float(group["lr"]) if trains else math.nan)
        optimizer.step()
        scheduler.step()
    return rates


def lines_of(rates: dict[str, list[float]]) -> dict[str, list[float]]:
    """One line a group, by label: a stage's two groups (with decay and without) share one where they coincide."""
    lines: dict[str, list[float]] = {}
    for name, values in rates.items():
        stage = name.rpartition("/")[0]
        alike = [other for other in rates if other.rpartition("/")[0] == stage]
        same = all(_equal(rates[other], values) for other in alike)
        label = stage if same else name
        lines[label if not all(map(math.isnan, values)) else f"{label} (never trains)"] = values
    return lines


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b))


def draw_rates(rates: dict[str, list[float]], path: Path) -> Path:
    """Draw every group's learning rate over the optimizer steps; a PNG, written whole."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = lines_of(rates)
    stages = list(dict.fromkeys(label.split(" ")[0].partition("/")[0] for label in lines))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"]
    for label, values in lines.items():
        color = colors(stages.index(label.split(" ")[0].partition("/")[0]) / max(1, len(stages) - 1))
        style = "--" if "/no_decay" in label else "-"
        axes.plot(values, label=label, color=color, linewidth=1.5, linestyle=style)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate (where the group trains)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144, format="png", metadata={"Software": ""})
    return path
