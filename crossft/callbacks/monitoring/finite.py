"""A run that diverged fails with its reason, instead of being measured as if it had been trained."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from crossft.errors import TrainingError
from crossft.tasks.sharding import own_slice

__all__ = ["FiniteCheck"]


class FiniteCheck(Callback):
    """Stops training once the loss or a weight is NaN or infinite.

    The loss of every step is kept on its device, without waiting for it; they are looked at, together with the weights,
    every ``trainer.log_every_n_steps`` optimizer steps, before a validation, at the end of an epoch and before every
    save. All processes stop together; the last checkpoint is from before.

    Raises:
        TrainingError: with the step at which the loss was first not finite.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing seen."""
        self._losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss with its optimizer step (from 1), and look at those kept when it is time."""
        assert self._losses is not None
        step = trainer.global_step
        self._losses.append((max(step, 1), outputs["loss"].detach()))
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every == 0 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before a validation within training."""
        if self._losses is not None and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the epoch's checkpoint."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before anything is written."""
        if self._losses is not None:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._losses is not None
        seen = torch.stack([loss for _, loss in self._losses]).isfinite().tolist() if self._losses else []
        first = next((step for (step, _), finite in zip(self._losses, seen) if not finite), -1)
        weights = [own_slice(p.detach()) for p in pl_module.parameters() if p.requires_grad]
        fine = first < 0 and (not weights or bool(torch.stack([p.isfinite().all() for p in weights]).all()))
        if trainer.strategy.reduce_boolean_decision(fine, all=True):
            self._losses.clear()
            return
        what = f"the loss is not finite since optimizer step {first}" if first >= 0 else "weights are not finite"
        raise TrainingError(
            f"training diverged: {what} (now at step {trainer.global_step}); lower the learning rate "
            "(model.optimizer.lr) or a method's weight, or clip gradients (trainer.gradient_clip_val)"
        )
