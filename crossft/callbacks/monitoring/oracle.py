"""What a choice by target labels would have given: predictions now, labels when the choice is made."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossft.callbacks.retention.rehearsal import seen_by
from crossft.data.prepare import first_rows
from crossft.runs import replacing
from crossft.tasks import Task
from crossft.types import Batch

__all__ = ["Oracle", "recorded", "remove_recorded"]


class Oracle(Callback):
    """Keeps, at each validation of a fit, what the model predicts for the targets' test rows.

    It reads test *inputs* and no label, draws nothing and changes nothing, so training and selection are as without
    it. It costs one pass over those rows a validation. ``recorded`` reads the predictions back, once the checkpoint is
    chosen.

    Args:
        folder: where to keep them: ``step-N.safetensors``, N the optimizer step (from 1) the validation is logged in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the test rows of every target."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        assert isinstance(pl_module, Task)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        starts = first_rows(data.prepared)
        found: dict[str, Tensor] = {}
        for number, (prepared, start) in enumerate(zip(data.prepared, starts)):
            rows = start + prepared.rows("test")
            if prepared.domain.role == "target" and len(rows):
                with trainer.precision_plugin.val_step_context():
                    found[prepared.domain.name] = seen_by(pl_module, data, {number: rows}, partial(_predict, pl_module))
        if trainer.is_global_zero and found:
            self.folder.mkdir(parents=True, exist_ok=True)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1  # within an accumulation the one under way
            with replacing(self.folder / f"step-{step}.safetensors") as temporary:
                save_file({k: v.contiguous() for k, v in found.items()}, temporary)


def _predict(task: Task, batch: Batch) -> Tensor:
    domain = task.domains[int(batch.domains.max())]  # one domain a batch, and padding below 0
    return task.predictions(task.model_step(batch).logits[task.head_keys[domain.name]], domain)


def recorded(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Predictions of each target's test rows, in the order of sample ids, by optimizer step and domain."""
    files = {int(path.stem.split("-")[1]): path for path in folder.glob("step-*.safetensors")}
    return {step: {k: torch.Tensor(v) for k, v in load_file(files[step]).items()} for step in sorted(files)}


def remove_recorded(folder: Path) -> None:
    """Remove the predictions."""
    shutil.rmtree(folder, ignore_errors=True)
