"""EMA: an exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.averaging.base import PublishedWeights, trained_state
from crossft.errors import ConfigError
from crossft.functional.averaging import warmed_decay
from crossft.tasks import Task

__all__ = ["EMA"]


class EMA(PublishedWeights):
    """Exponential moving average of the weights (after Polyak & Juditsky 1992): average <- d average + (1 - d) weights.

    The clock is the optimizer step: accumulation and resumption do not move it. BatchNorm's running statistics are
    averaged along. Memory: one more copy of the model; a checkpoint holds both.

    Args:
        decay: d (0.999: the usual choice for thousands of steps; 1 - 1/100 for hundreds).
        warm_up: begin with d = (1 + t) / (10 + t), so that short runs do not end near their start.

    Raises:
        ConfigError: ``decay`` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999, warm_up: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay={decay} must be in [0, 1): 0 keeps the weights of now, 1 would keep the start")
        self.decay, self.warm_up = decay, warm_up
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._seen = 0

    def published(self, task: Task) -> dict[str, Tensor] | None:
        """The average; nothing before the first step."""
        return self.average or None

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the weights of now, or go on."""
        assert isinstance(pl_module, Task)
        state = trained_state(pl_module)
        if not self.average:
            self.average = {n: t.clone() for n, t in state.items()}
            self._seen = trainer.global_step
        self.average = {n: self.average[n].to(t.device) for n, t in state.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the weights after an optimizer step."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        assert isinstance(pl_module, Task)
        decay = warmed_decay(self.decay, self.updates) if self.warm_up else self.decay
        state = trained_state(pl_module)
        torch._foreach_lerp_(list(self.average.values()), [state[n] for n in self.average], 1.0 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The average and its clock."""
        return {"average": dict(self.average), "updates": self.updates, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average, self.updates = dict(state_dict["average"]), state_dict["updates"]
        self._seen = state_dict["seen"]
