"""A callback of a user's own package, allowed by ``--allow interrupting``: stops the process as a scheduler would."""

from __future__ import annotations

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Sends SIGTERM to its own process at the optimizer steps in STOP_AT, of runs trained on the roles in STOP_IN."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        roles = os.environ.get("STOP_IN", "")
        if (
            str(trainer.global_step) in os.environ.get("STOP_AT", "").split(",")
            and roles in trainer.datamodule.train_on
        ):
            os.kill(os.getpid(), signal.SIGTERM)
