"""The ledger: what trains in each phase, stage by stage, at which learning rate and decay, in which mode."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from crossft.backbones import batch_norms
from crossft.runs import RunFolder, write_atomic
from crossft.tasks import Task

__all__ = ["COLUMNS", "Ledger", "ledger_rows"]

COLUMNS = ("phase", "step", "stage", "parameters", "trainable", "lr", "weight_decay", "mode", "batchnorm")
"""``phase`` counts from 0, ``step`` is its first optimizer step, ``lr`` the learning rate there (of a frozen stage:
what it would train at), ``mode`` that of the modules: ``train``, ``frozen`` (nothing trains, and all are in evaluation
mode) or ``eval`` (they are, though something trains)."""

Row = dict[str, Any]


def ledger_rows(task: Task, groups: Iterable[Mapping[str, Any]], phase: int = 0, step: int = 0) -> list[Row]:
    """Rows of one phase: every stage, head and term with parameters of its own, in the optimizer's order.

    Args:
        task: with the phase applied.
        groups: the optimizer's groups, named ``STAGE/decay-kind``.
        phase: number of the phase, from 0.
        step: its first optimizer step.
    """
    stages = {s.name: s.modules for s in task.backbone.stages}
    owners: dict[str, tuple[nn.Module, ...]] = {
        **stages,
        **{f"head.{key}": (head,) for key, head in task.heads.items()},
        **{f"term.{key}": (term,) for key, term in task.attachments.terms.items()},
    }
    rows: dict[str, Row] = {}
    for group in groups:
        name, _, kind = group["name"].rpartition("/")
        row = rows.setdefault(name, {**dict.fromkeys(COLUMNS, 0), "phase": phase, "step": step, "stage": name})
        row["parameters"] += sum(p.numel() for p in group["params"])
        row["trainable"] += sum(p.numel() for p in group["params"] if p.requires_grad)
        row["lr"] = float(group["lr"])
        if kind == "decay":
            row["weight_decay"] = float(group["weight_decay"])
    for name, row in rows.items():
        modules = [m for owner in owners.get(name, ()) for m in owner.modules()]
        training = any(m.training for m in modules) or (not modules and bool(row["trainable"]))
        row["mode"] = "train" if training else "eval" if row["trainable"] else "frozen"
        policy = "frozen" if name in task.frozen_stages else str(task.batchnorm)
        row["batchnorm"] = policy if any(batch_norms(m) for m in stages.get(name, ())) else ""
    return list(rows.values())


class Ledger(Callback):
    """Writes ``ledger.csv`` when training starts and at every phase change.

    The task checks that what it says stays so (``crossft.tasks.trainability``), with this callback or without. Its rows
    are in the checkpoint, so that a resumed run writes the ledger of the run that was never stopped. It stands after
    the methods among the callbacks, so that it sees a phase as it has begun.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = RunFolder(folder).ledger
        self.rows: list[Row] = []
        self._seen: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look whether another phase has begun; a phase is told by its first step and by what trains."""
        if batch_idx % trainer.accumulate_grad_batches or not isinstance(pl_module, Task):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        seen = [getattr(pl_module.schedule, "start", 0), sum([p.requires_grad for g in groups for p in g["params"]])]
        if seen == self._seen:
            return
        self._seen = seen
        phase = self.rows[-1]["phase"] + 1 if self.rows else 0
        self.rows += ledger_rows(pl_module, groups, phase, trainer.global_step)
        if trainer.is_global_zero:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": [dict(row) for row in self.rows], "seen": list(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of the checkpoint; what was written after it is written again."""
        self.rows, self._seen = state_dict["rows"], state_dict["seen"]
