"""Regression on one number a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crossft.backbones import Backbone
from crossft.tasks.base import Task
from crossft.types import Domain

__all__ = ["Regression"]


class Regression(Task):
    """Mean squared or absolute error, on targets standardized by the labeled training rows.

    The head predicts in standard units; predictions and metrics are in the label's own units. Mean and scale are part
    of the model's state, so a later leg keeps them.

    Args:
        backbone: the pretrained network.
        domains: see :class:`Task`.
        loss: ``mse``, ``mae`` or ``huber`` (Huber 1964, delta 1), in standard units.
        standardize: subtract the mean and divide by the standard deviation of the training labels.
        **kwargs: optimizer, schedule and the other arguments of :class:`Task`.

    Raises:
        ConfigError: a domain whose labels are classes.
    """

    kinds = ("regression",)

    def __init__(
        self,
        backbone: Backbone,
        domains: list[Domain] | None = None,
        loss: Literal["mse", "mae", "huber"] = "mse",
        standardize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, domains, **kwargs)
        losses: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
        self.loss = losses[loss]
        self.standardize = standardize
        self.label_mean: Tensor
        self.label_scale: Tensor
        self.label_known: Tensor
        self.register_buffer("label_mean", torch.zeros(()))
        self.register_buffer("label_scale", torch.ones(()))
        self.register_buffer("label_known", torch.zeros((), dtype=torch.bool))

    def setup(self, stage: str) -> None:
        """Take mean and scale from the training labels, once in the life of a model."""
        super().setup(stage)
        if stage == "fit" and self.standardize and not bool(self.label_known):
            mean, scale = self.trainer.datamodule.label_moments()  # type: ignore[attr-defined]
            self.label_mean.fill_(mean)
            self.label_scale.fill_(scale or 1.0)
            self.label_known.fill_(True)

    def per_sample_loss(self, logits: Tensor, targets: Tensor, rows: Tensor, domain: Domain) -> Tensor:
        """Loss of each row in standard units, [b]."""
        clean = targets.masked_fill(~rows, 0.0)
        losses = self.loss(logits[:, 0], (clean - self.label_mean) / self.label_scale, reduction="none")
        return losses.masked_fill(~rows, 0.0)

    def predictions(self, logits: Tensor, domain: Domain) -> Tensor:
        """Values [b] in the label's own units."""
        return logits[:, 0].float() * self.label_scale + self.label_mean
