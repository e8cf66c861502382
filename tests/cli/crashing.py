"""Callbacks of a user's own package, allowed by ``--allow crashing``: one fails, one notes where a fit was ended."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Crash(Callback):
    """Divides by zero at the third optimizer step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        1 // max(0, 2 - trainer.global_step)


class Ends(Callback):
    """Each process writes what ended its fit, and at which step, into the folder ENDS."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        text = f"{type(exception).__name__} {trainer.global_step}"
        (Path(os.environ["ENDS"]) / f"rank-{trainer.global_rank}").write_text(text)
