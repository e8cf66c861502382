"""Progress on the screen: a bar on a terminal, one line an epoch elsewhere, with the metrics that matter."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from crossft.metrics import primary_metric
from crossft.tasks import Task

__all__ = ["EpochLines", "ProgressBar", "important", "progress"]


def important(task: Task, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Loss, and the primary validation metric of every domain."""
    keys = ["train/loss"]
    keys += [f"{task.evaluation.names[d.name]}/val/{primary_metric(d.kind).name}" for d in task.domains]
    return {key: float(metrics[key]) for key in keys if key in metrics}


class ProgressBar(RichProgressBar):
    """A rich bar that shows what ``important`` picks."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Only the metrics that matter."""
        return dict(important(pl_module, trainer.callback_metrics)) if isinstance(pl_module, Task) else {}


class EpochLines(Callback):
    """One line an epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line, from the first process."""
        if trainer.is_global_zero and isinstance(pl_module, Task):
            shown = "  ".join(f"{k} {v:.3f}" for k, v in important(pl_module, trainer.callback_metrics).items())
            seconds = time.monotonic() - self._start
            epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
            print(f"epoch {trainer.current_epoch + 1}/{epochs}  step {trainer.global_step}  {seconds:.0f} s  {shown}")


def progress(asked: bool | None) -> Callback:
    """The bar on a terminal unless switched off, lines elsewhere."""
    return ProgressBar() if asked is not False and sys.stdout.isatty() else EpochLines()
