"""Models that are published in place of the one that trains: averages and blends of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.functional.averaging import blended
from crossft.tasks import Task

__all__ = ["PublishedWeights", "trained_state"]

RAW = "training_weights"
"""Where a checkpoint keeps the weights that train, beside the published ones in its ``state_dict``."""


class PublishedWeights(Callback, ABC):
    """Base of the methods that evaluate, save and hand on other weights than those that train.

    Training goes on untouched. Validation measures the published weights, a checkpoint's ``state_dict`` holds them (so
    test, predict, ``--init`` and the choice of the best checkpoint read them), and so does the model after the fit; a
    resume takes the weights that train. Only floating-point entries of backbone and heads are blended: BatchNorm's
    running statistics among them, counters never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__.lower()
        self._kept: dict[str, Tensor] | None = None
        self._over = False

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"{type(self).__name__}[{self.name}]"

    @abstractmethod
    def published(self, task: Task) -> dict[str, Tensor] | None:
        """What stands in for some entries of the task's state dict; None while there is nothing to publish yet."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: another method publishes weights too, BatchNorm statistics are computed for the weights that
                train, or the strategy shards them.
        """
        if stage != "fit":
            return
        self._over = False
        refuse_sharded(trainer, self.name)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, PublishedWeights) and c is not self]
        if isinstance(pl_module, Task) and pl_module.batchnorm.startswith("reestimated"):
            raise ConfigError(
                f"methods.{self.name} publishes other weights than those that model.batchnorm={pl_module.batchnorm} "
                "computes statistics for; use frozen, and `crossft average --reestimate` for blends"
            )
        if others:
            raise ConfigError(
                f"methods.{self.name} and methods.{others[0].name} both publish weights; switch one of them off"
            )

    # -- in and out of the model ---------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the published weights; those that train are kept aside."""
        assert isinstance(pl_module, Task)
        new = self.published(pl_module) if trainer.state.fn == "fit" else None
        if new is not None and self._kept is None:
            state = pl_module.state_dict()
            self._kept = {name: state[name].clone() for name in new}
            _fill(pl_module, new)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on training with those that train."""
        assert isinstance(pl_module, Task)
        if self._kept is not None:
            _fill(pl_module, self._kept)
            self._kept = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the published weights in the model."""
        assert isinstance(pl_module, Task)
        new = self.published(pl_module)
        if new is not None:
            _fill(pl_module, new)
        self._over = True

    # -- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the published weights as the model, and those that train beside them."""
        assert isinstance(pl_module, Task)
        new = None if self._over or self._kept is not None else self.published(pl_module)
        state = checkpoint["state_dict"]
        if self._kept is not None:  # within a validation the model holds the published ones
            checkpoint[RAW] = dict(self._kept)
        elif new is not None:
            checkpoint[RAW] = {name: state[name] for name in new}
            checkpoint["state_dict"] = {**state, **new}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume with the weights that train; the published ones were loaded before this."""
        if trainer.state.fn == "fit" and RAW in checkpoint:
            assert isinstance(pl_module, Task)
            _fill(pl_module, checkpoint[RAW])


@torch.no_grad()
def _fill(task: Task, values: dict[str, Tensor]) -> None:
    state = task.state_dict()
    for name, value in values.items():
        state[name].copy_(value)


def trained_state(task: Task) -> dict[str, Tensor]:
    """Backbone and heads: the floating-point entries of the task's state dict, not copied."""
    state = task.state_dict()
    return {n: state[n] for n in blended(state) if n.startswith(("backbone.", "heads."))}
