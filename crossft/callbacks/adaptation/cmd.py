"""CMD: equal central moments (Zellinger et al. 2017)."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from crossft.callbacks.adaptation.pairs import check_pairs, pair_distance
from crossft.callbacks.adaptation.roles import Between
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import central_moment_discrepancy
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["CMD"]

Squash = Literal["sigmoid", "tanh", "none"]


def _cmd(first: list[Tensor], second: list[Tensor], moments: int, squash: Squash) -> Tensor:
    """Sum over layers of the central moment discrepancy of squashed activations."""
    width = 2.0 if squash == "tanh" else 1.0
    parts = []
    for x, y in zip(first, second, strict=True):
        if squash != "none":
            x, y = (torch.sigmoid(v) if squash == "sigmoid" else torch.tanh(v) for v in (x, y))
        parts.append(central_moment_discrepancy(x, y, moments, width))
    return torch.stack(parts).sum()


class CMD(MethodCallback):
    """CMD (Zellinger et al. 2017, Central Moment Discrepancy for Domain-Invariant Representation Learning, def. 2).

    The distances of the means and of the central moments up to order K, each divided by |b - a| to its order, summed
    over layers. It is defined on [a, b]: the paper's hidden units are sigmoid or tanh, those of a pretrained backbone
    mostly not, so activations are squashed first. Rows of all processes are used together; under gradient
    accumulation each micro-batch by itself.

    Args:
        weight: lambda (1 in the paper).
        moments: K (5 in the paper).
        squash: ``sigmoid`` (b - a = 1), ``tanh`` (2), or ``none`` for activations that already lie in [0, 1].
        layers: ``features``, ``logits``, ``probabilities`` or names of stages.
        between: ``roles`` (all sources against all targets), ``pairs`` (each source domain against each target
            domain), or ``sources`` (every two sources; no target needed).

    Raises:
        ConfigError: an argument out of range.
        StageError: a layer that is none.
    """

    needs_source = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        moments: int = 5,
        squash: Squash = "sigmoid",
        layers: tuple[str, ...] = ("features",),
        between: Between = "roles",
    ) -> None:
        super().__init__(weight)
        check_pairs(layers, between)
        if moments < 1:
            raise ConfigError(f"moments={moments} must be at least 1: the highest moment that is compared")
        if squash not in get_args(Squash):
            raise ConfigError(f"squash={squash!r} is unknown; allowed: {', '.join(get_args(Squash))}")
        self.moments, self.squash, self.layers, self.between = moments, squash, tuple(layers), between
        self.needs_target = "none" if between == "sources" else "unlabeled"

    def build(self, task: Task) -> LossTerm:
        """Resolve pairs and layers."""
        distance = partial(_cmd, moments=self.moments, squash=self.squash)
        return pair_distance(task, self.name, self.layers, self.between, distance)
