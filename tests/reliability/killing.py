"""Callbacks that a run under test names in its config: one notes what it sees, one kills the run.

They are configured by environment variables, so that the run's config, and with it its identity, stays the same.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

__all__ = ["KillAt", "Seen"]


class Seen(Callback):
    """Appends the sample ids of every micro-batch to a file of this process."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        folder = Path(os.environ["SEEN"])
        folder.mkdir(parents=True, exist_ok=True)
        leg = "-".join(trainer.datamodule.roles["target"]) or "source"
        with (folder / f"{leg}-{trainer.global_rank}.jsonl").open("a") as file:
            micro = batch_idx % trainer.accumulate_grad_batches
            file.write(json.dumps([trainer.global_step, micro, batch.sample_ids.tolist()]) + "\n")


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
