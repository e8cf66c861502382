"""A callback of a user's own package, allowed by ``--allow interrupting``: stops the process as a scheduler would."""

from __future__ import annotations

import os
import signal
import time

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


class HoldAt(Callback):
    """In the first attempt of a SLURM job, waits at the optimizer step HOLD_AT for a signal, in runs named HOLD_IN."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        again = "SLURM_RESTART_COUNT" in os.environ or "SLURM_JOB_ID" not in os.environ
        if again or str(trainer.global_step) != os.environ["HOLD_AT"]:
            return
        if f"/{os.environ['HOLD_IN']}" not in trainer.default_root_dir:
            return
        print(f"holding at step {trainer.global_step}", flush=True)
        until = time.monotonic() + 60
        while trainer.checkpoint_callback.stopping.received is None and time.monotonic() < until:
            time.sleep(0.05)
