"""Deep CORAL: equal covariances (Sun & Saenko 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.callbacks.adaptation.pairs import check_pairs, pair_distance
from crossft.callbacks.adaptation.roles import Between
from crossft.callbacks.base import MethodCallback
from crossft.functional import coral
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["CORAL"]


def _coral(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Sum over layers of the squared distance of covariances."""
    return torch.stack([coral(x, y) for x, y in zip(first, second, strict=True)]).sum()


class CORAL(MethodCallback):
    """Deep CORAL (Sun & Saenko 2016, Correlation Alignment for Deep Domain Adaptation, eq. 1 to 3).

    1/(4 d^2) ||C_s - C_t||_F^2 of the covariances of source and target rows, summed over layers. Rows of all
    processes are used together; under gradient accumulation each micro-batch by itself. tllib and DomainBed also
    compare the means and drop the 1/4; this is the paper's loss.

    Args:
        weight: lambda. The paper sets it so that at the end of training the classification loss and this one are
            about equal; 1 is a start, and the 1/(4 d^2) makes larger values usual on wide ``features``.
        layers: ``logits`` (the layer of the paper), ``features``, ``probabilities`` or names of stages.
        between: ``roles`` (all sources against all targets), ``pairs`` (each source domain against each target
            domain), or ``sources`` (every two sources; no target needed, as in DomainBed).

    Raises:
        ConfigError: an argument out of range.
        StageError: a layer that is none.
    """

    needs_source = "unlabeled"

    def __init__(self, weight: float = 1.0, layers: tuple[str, ...] = ("logits",), between: Between = "roles") -> None:
        super().__init__(weight)
        check_pairs(layers, between)
        self.layers, self.between = tuple(layers), between
        self.needs_target = "none" if between == "sources" else "unlabeled"

    def build(self, task: Task) -> LossTerm:
        """Resolve pairs and layers."""
        return pair_distance(task, self.name, self.layers, self.between, _coral)
