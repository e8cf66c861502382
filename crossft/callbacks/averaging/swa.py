"""SWA: the plain mean of weights along the way (Izmailov et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.averaging.base import PublishedWeights, trained_state
from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["SWA"]


class SWA(PublishedWeights):
    """Stochastic weight averaging (Izmailov et al. 2018, algorithm 1): the mean of the weights after ``start``.

    The learning rate is the schedule's: give one that stays up (``crossft.optim.Constant``) after ``start``, as the
    paper does. Until then the weights of now are published. BatchNorm's running statistics are averaged along; where
    they train (``model.batchnorm=training``) the paper computes them anew, as
    :func:`crossft.backbones.batchnorm.reestimate_` does.

    Args:
        start: share of training after which averaging begins (0.75 in the paper, section 4).
        every_n_steps: optimizer steps between two weights in the mean (the paper takes one an epoch).

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, start: float = 0.75, every_n_steps: int = 1) -> None:
        super().__init__()
        if not 0.0 <= start < 1.0:
            raise ConfigError(f"start={start} must be in [0, 1): the share of training before the mean begins")
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1")
        self.start, self.every_n_steps = start, every_n_steps
        self.average: dict[str, Tensor] = {}
        self.count = 0
        self._seen = 0

    def published(self, task: Task) -> dict[str, Tensor] | None:
        """The mean; nothing before ``start``."""
        return self.average or None

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring a restored mean to the device."""
        assert isinstance(pl_module, Task)
        state = trained_state(pl_module)
        self.average = {n: t.to(state[n].device) for n, t in self.average.items()}
        self._seen = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the weights after an optimizer step that is due."""
        step = trainer.global_step
        assert isinstance(pl_module, Task)
        if step == self._seen or pl_module.progress < self.start:
            return
        self._seen = step
        if step % self.every_n_steps:
            return
        state = trained_state(pl_module)
        self.count += 1
        if self.count == 1:
            self.average = {n: t.clone() for n, t in state.items()}
        else:
            torch._foreach_lerp_(list(self.average.values()), [state[n] for n in self.average], 1.0 / self.count)

    def state_dict(self) -> dict[str, Any]:
        """The mean so far."""
        return {"average": dict(self.average), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average, self.count = dict(state_dict["average"]), state_dict["count"]
