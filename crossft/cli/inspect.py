"""``crossft inspect --config FILE``: what of the model trains, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path
from typing import Any

from torch import nn

from crossft.callbacks.freezing import Phase
from crossft.callbacks.monitoring import ledger_rows
from crossft.cli.ahead import Ahead, look_ahead, settings_of
from crossft.cli.costs import full_cost, step_cost
from crossft.cli.curves import begin_phase, draw_rates, dry_rates
from crossft.cli.saved import take_option
from crossft.cli.screen import print_table
from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["foreseen_ledger", "run", "stage_rows"]


def run(command: str, arguments: list[str]) -> int:
    """Print one row a stage, then the ledger of every phase; draw the learning rates where a file is named."""
    rest, curve = take_option(arguments, "curve")
    rest, steps = take_option(rest, "steps")
    if steps is not None and (not steps.isdigit() or int(steps) < 1):
        raise ConfigError(f"--steps {steps}: give the number of optimizer steps of the run, at least 1")
    ahead = look_ahead(settings_of(rest), int(steps) if steps else None)
    if curve is not None and ahead.course is None:
        raise ConfigError(
            "--curve needs the number of optimizer steps: --steps N, trainer.max_steps in the config, or the data "
            "(--data.root with --data.source or --data.target)"
        )
    task = ahead.task
    print_table(type(task.backbone).__name__, ["stage", "parameters", "trainable", "buffers"], stage_rows(task))
    print(f"batchnorm: {task.batchnorm}; a head is added for every label space")
    if ahead.stand_in:
        print(
            "* the data was not read (--data.root with --data.source or --data.target): a head of two classes stands "
            "in, in its row and in the share that trains"
        )
    if ahead.left_out:
        print(f"methods.{', methods.'.join(ahead.left_out)}: built from the data, so own parameters are not counted")
    full = full_cost(task)
    for index, phase in enumerate(ahead.plan or [None]):
        _print_phase(ahead, index, phase, full)
    if curve is not None and ahead.course is not None:
        draw_rates(dry_rates(task, ahead.plan, ahead.course), Path(curve))
        print(f"learning rates over {ahead.course.total} optimizer steps: {curve}")
    return 0


def foreseen_ledger(ahead: Ahead, index: int, phase: Phase | None) -> list[dict[str, Any]]:
    """Rows of a phase as the run's ``ledger.csv`` will have them; the task is in that phase afterwards.

    Where the number of steps is not known, or the phase is not entered, the learning rates are those that the schedule
    is a factor on.
    """
    task = ahead.task
    if phase is not None:
        phase.apply(task)
    groups, step, factor = task.named_groups(), 0, 1.0 if phase is None else phase.lr
    if ahead.course is not None and index < len(ahead.starts):
        step = ahead.starts[index]
        factor = begin_phase(task, phase or Phase(), step, ahead.course)(step, ahead.course.total)
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return ledger_rows(task, groups, index, step)


def _print_phase(ahead: Ahead, index: int, phase: Phase | None, full: tuple[int, int]) -> None:
    ledger = foreseen_ledger(ahead, index, phase)
    head = ["stage", "mode", "batchnorm", "trainable", "parameters", "lr", "decay"]
    cells = [
        [r["stage"], r["mode"], r["batchnorm"], f"{r['trainable']:,}", f"{r['parameters']:,}", f"{r['lr']:.3g}",
         f"{r['weight_decay']:g}"]
        for r in ledger
    ]  # fmt: skip
    if ahead.stand_in:
        cells = [[f"{row[0]}*" if row[0].startswith("head.") else row[0], *row[1:]] for row in cells]
    trainable, everything = (sum(r[key] for r in ledger) for key in ("trainable", "parameters"))
    reached = list(dropwhile(lambda row: not row["trainable"], ledger))
    forward, backward = step_cost(ahead.task)
    print_table(f"phase {index}: {_span(ahead, index, phase)}", head, cells, text_columns=3)
    print(
        f"trains {trainable / everything:.1%} of the parameters; the backward pass ends at {reached[0]['stage']}: "
        f"{backward / 1e6:,.1f} MFLOP a row, {backward / max(1, full[1]):.1%} of where everything trains; a step (with "
        f"{forward / 1e6:,.1f} forward) {(forward + backward) / max(1, sum(full)):.1%}"
    )


def _span(ahead: Ahead, index: int, phase: Phase | None) -> str:
    """How long a phase lasts, and where it begins as far as that is known."""
    length = next((f"{n}={getattr(phase, n)}" for n in phase.lengths), "to the end") if phase else "to the end"
    if ahead.course is None:
        return f"{length}; lr: what the schedule is a factor on (its steps are not known: --steps N)"
    if index >= len(ahead.starts):
        return f"{length}; not entered within {ahead.course.total} optimizer steps"
    patient = any(p.patience for p in ahead.plan[:index])
    start = f"{ahead.starts[index]}{' at the earliest' if patient else ''}"
    return f"{length}; from optimizer step {start} of {ahead.course.total}, lr: there"


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
