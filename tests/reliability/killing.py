"""Callbacks that a run under test names in its config: one notes what it sees, one kills the run.

They are configured by environment variables, so that the run's config, and with it its identity, stays the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

__all__ = ["KillAt", "Seen"]


class Seen(Callback):
    """Appends to a file of this process the sample ids of every micro-batch, and what each optimizer step is done with:
    ``requires_grad`` of every parameter, the mode of every module, every group's learning rate.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % trainer.accumulate_grad_batches
        self._note(trainer, [trainer.global_step, micro, batch.sample_ids.tolist()])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        state = [
            [n for n, p in pl_module.named_parameters() if p.requires_grad],
            [n for n, m in pl_module.named_modules() if m.training],
            [g["lr"] for g in optimizer.param_groups],
        ]
        digest = hashlib.sha256(repr(state).encode()).hexdigest()
        self._note(trainer, [trainer.global_step, "trains", digest])

    def _note(self, trainer: Any, line: list[Any]) -> None:
        folder = Path(os.environ["SEEN"])
        folder.mkdir(parents=True, exist_ok=True)
        leg = "-".join(trainer.datamodule.roles["target"]) or "source"
        with (folder / f"{leg}-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class KillAt(Callback):
    """Kills the whole process group with SIGKILL: ``backward:N`` after the N-th backward, ``epoch_end:N`` when the
    N-th epoch ends, before its checkpoint, ``epoch_start:N`` when the N-th begins, after the last one's checkpoint,
    ``importance:N`` at the N-th forward between the start of the fit and that of training, ``train_end:1`` after the
    last checkpoint, before any method has taken leave.

    With ``LEG/`` before it, only in the leg whose target that is (``source``: the leg without one).
    """

    def __init__(self) -> None:
        self.counts = {"backward": 0, "epoch_end": 0, "epoch_start": 0, "importance": 0, "train_end": 0}
        self.leg, self.handle = "", None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.leg = "-".join(trainer.datamodule.roles["target"]) or "source"

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        leg, _, point = os.environ.get("KILL_AT", "").rpartition("/")
        if leg in ("", self.leg) and point == f"{what}:{self.counts[what]}":
            os.killpg(os.getpgid(0), signal.SIGKILL)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = pl_module.backbone.register_forward_pre_hook(lambda *_: self._count("importance"))

    def on_train_start(self, *_: Any) -> None:
        self.handle.remove()

    def on_after_backward(self, *_: Any) -> None:
        self._count("backward")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._count("epoch_end")

    def on_train_epoch_start(self, *_: Any) -> None:
        self._count("epoch_start")

    def on_train_end(self, *_: Any) -> None:
        self._count("train_end")
