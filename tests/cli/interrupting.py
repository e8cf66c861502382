"""A user's own package, allowed by ``--allow interrupting``: a callback that stops the process, and a data set."""

from __future__ import annotations

import os
import signal
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """A data set of one's own: 40 images of noise in two classes."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator), index % 2


class StopAt(Callback):
    """Sends SIGTERM to its own process at the optimizer steps in STOP_AT, of runs trained on the role in STOP_IN, or
    whose target that is."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        roles = os.environ.get("STOP_IN", "")
        if str(trainer.global_step) in os.environ.get("STOP_AT", "").split(",") and roles in (
            *trainer.datamodule.train_on,
            *trainer.datamodule.roles["target"],
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
