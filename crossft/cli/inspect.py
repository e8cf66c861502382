"""``crossft inspect --config FILE``: what of the model trains, phase by phase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path

from torch import nn

from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.monitoring import ledger_rows
from crossft.cli.costs import full_cost, step_cost
from crossft.cli.curves import draw_rates, dry_rates
from crossft.cli.parser import Settings
from crossft.cli.saved import take_option
from crossft.cli.screen import print_table
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Domain

__all__ = ["run", "stage_rows"]


def run(command: str, arguments: list[str]) -> int:
    """Print one row a stage, then the ledger of every phase; draw the learning rates where a file is named."""
    rest, curve = take_option(arguments, "curve")
    rest, steps = take_option(rest, "steps")
    settings = Settings(["--data.root=.", *rest], "inspect")
    task = _task(settings)
    plan: list[Phase] = []
    for name, method in dict(settings.build("methods").methods or {}).items():
        if isinstance(method, (Freeze, GradualUnfreezing)):
            method.name = name
            method.setup(None, task, "fit")  # type: ignore[arg-type]  # it reads the task alone
            plan = method.plan if isinstance(method, GradualUnfreezing) else plan
    rows = stage_rows(task)
    print_table(type(task.backbone).__name__, ["stage", "parameters", "trainable", "buffers"], rows)
    print(f"batchnorm: {task.batchnorm}; a head is added for every label space")
    full = full_cost(task)
    for index, phase in enumerate(plan or [None]):
        if phase is not None:
            phase.apply(task)
        _print_phase(task, index, phase, full)
    if curve is not None:
        _draw(settings, task, plan, Path(curve), steps)
    return 0


def _print_phase(task: Task, index: int, phase: Phase | None, full: tuple[int, int]) -> None:
    ledger = ledger_rows(task, task.named_groups(), index)
    factor = 1.0 if phase is None else phase.lr
    head = ["stage", "mode", "batchnorm", "trainable", "parameters", "lr", "decay"]
    rows = [
        (r["stage"], r["mode"], r["batchnorm"], r["trainable"], r["parameters"], factor * r["lr"], r["weight_decay"])
        for r in ledger
    ]
    cells = [[*row[:3], f"{row[3]:,}", f"{row[4]:,}", f"{row[5]:.3g}", f"{row[6]:g}"] for row in rows]
    trainable, everything = (sum(r[key] for r in ledger) for key in ("trainable", "parameters"))
    reached = list(dropwhile(lambda row: not row["trainable"], ledger))
    forward, backward = step_cost(task)
    length = next((f"{n}={getattr(phase, n)}" for n in phase.lengths), "to the end") if phase else "to the end"
    print_table(f"phase {index}: {length}", head, cells, text_columns=3)
    print(
        f"trains {trainable / everything:.1%} of the parameters; the backward pass ends at {reached[0]['stage']}: "
        f"{backward / 1e6:,.1f} MFLOP a row, {backward / max(1, full[1]):.1%} of where everything trains; a step (with "
        f"{forward / 1e6:,.1f} forward) {(forward + backward) / max(1, sum(full)):.1%}"
    )


def _draw(settings: Settings, task: Task, plan: list[Phase], path: Path, steps: str | None) -> None:
    """Draw the learning rates over as many optimizer steps as ``--steps`` or trainer.max_steps say."""
    trainer = settings.config.trainer
    if steps is not None and not steps.isdigit():
        raise ConfigError(f"--steps {steps}: give the number of optimizer steps of the run")
    total = int(steps or 0) or max(0, int(trainer.max_steps or 0))
    if not total:
        raise ConfigError("--curve needs the number of optimizer steps: --steps N, or trainer.max_steps in the config")
    epochs = max(1, int(trainer.max_epochs or 1))
    draw_rates(dry_rates(task, plan, total, math.ceil(total / epochs)), path)
    print(f"learning rates over {total} optimizer steps: {path}")


def stage_rows(task: Task) -> list[list[str]]:
    """Stage, parameters, trainable parameters and buffer entries, and their sum."""
    rows: list[tuple[str, int, int, int]] = []
    for stage in task.backbone.stages:
        parameters = stage.parameters()
        buffers = [b for module in stage.modules for b in module.buffers()]
        trainable = [p for p in parameters if p.requires_grad]
        rows.append((stage.name, _count(parameters), _count(trainable), sum(b.numel() for b in buffers)))
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows)))
    return [[name, f"{parameters:,}", f"{trains:,}", f"{held:,}"] for name, parameters, trains, held in rows]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _task(settings: Settings) -> Task:
    """The config's task over a stand-in domain of a kind it takes: the data is not read."""
    stand_ins = [Domain("data", "target", "multiclass", ("a", "b")), Domain("data", "target", "regression", ("y",))]
    for domain in stand_ins:
        settings.set_domains([domain])
        try:
            task: Task = settings.build("model").model
            return task
        except ConfigError:
            if domain is stand_ins[-1]:
                raise
    raise AssertionError("unreachable")
