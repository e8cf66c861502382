"""Drift limits: no layer's weights go further from their start than a radius (Gouk et al. 2021)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.start import StartingPoint
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import WeightPenalty

__all__ = ["DriftLimit", "length"]

Norm = Literal["frobenius", "mars"]


def length(difference: Tensor, norm: Norm) -> Tensor:
    """Size of a weight's difference from its start, a scalar in float32.

    Args:
        difference: any shape; the first dimension counts outputs.
        norm: ``frobenius``: square root of the sum of squares; ``mars``: the largest sum of absolute values of one
            output's weights (Gouk et al. 2021, eq. 8: the norm induced by the infinity norm).
    """
    d = difference.float()
    if norm == "frobenius":
        return d.square().sum().sqrt()
    return d.abs().sum().reshape(()) if d.ndim < 2 else d.abs().flatten(1).sum(1).max()


class DriftLimit(MethodCallback):
    """Distance-based regularization by projection (Gouk, Hospedales & Pontil 2021, section 4, algorithm 1).

    After every optimizer step each weight tensor of the backbone that lies further than the radius from its start is
    moved back along the straight line: w0 + (w - w0) * radius / ||w - w0||. The projection belongs to the optimizer's
    step, so everything that watches weights sees projected ones. Weight tensors are matrices and kernels; biases and
    norms are left, as published. Needs no data of the source.

    Args:
        radius: gamma. With ``relative``, a share of the start's own norm.
        norm: ``mars`` (the paper's best) or ``frobenius``.
        relative: whether the radius is relative.

    Raises:
        ConfigError: ``radius`` is negative, or ``norm`` unknown.
    """

    def __init__(self, radius: float = 0.1, norm: Norm = "mars", relative: bool = True) -> None:
        super().__init__(1.0)
        if radius < 0.0:
            raise ConfigError(f"radius={radius} must be >= 0; 0 holds the weights at their start")
        if norm not in ("mars", "frobenius"):
            raise ConfigError(f"norm={norm!r} is unknown; allowed: mars, frobenius")
        self.radius, self.norm, self.relative = radius, norm, relative
        self._handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then keep the starting point."""
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> WeightPenalty:
        """Keep the backbone's matrices and kernels of now: the leg's start."""
        self._start = StartingPoint({n: p for n, p in task.backbone.named_parameters() if p.ndim > 1})
        return self._start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project at the end of every optimizer step."""
        self._handles = [o.register_step_post_hook(lambda *_: self.project_()) for o in trainer.optimizers]

    @torch.no_grad()
    def project_(self) -> None:
        """Move back what is too far."""
        for name, parameter in self._start.named.items():
            if not parameter.requires_grad:
                continue
            start = self._start.of(name)
            limit = self.radius * (length(start, self.norm) if self.relative else 1.0)
            difference = parameter - start
            far = length(difference, self.norm)
            if float(far) > float(limit):
                parameter.copy_(start + difference * (limit / far).to(difference))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizer be."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
