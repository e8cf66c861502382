"""BSP: batch spectral penalization, an add-on for adversarial methods (Chen et al. 2019)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from crossft.callbacks.adaptation.pairs import pair_distance
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import spectral_penalty
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["BSP"]


def _penalty(first: list[Tensor], second: list[Tensor], k: int) -> Tensor:
    """Sum of both sides' penalties; a side without rows adds nothing."""
    return spectral_penalty(first[0], k) + spectral_penalty(second[0], k)


class BSP(MethodCallback):
    """BSP (Chen et al. 2019, Transferability vs. Discriminability: Batch Spectral Penalization, section 4).

    The k largest squared singular values of the source rows' feature matrix plus those of the target rows', so that
    no single direction carries the transfer. Use it beside DANN or CDAN; it reads neither. Rows of all processes form
    one matrix a side; it grows with the batch, as in the paper. Under gradient accumulation each micro-batch is a
    batch of its own.

    Args:
        weight: beta (1e-4 in the paper).
        k: singular values that are penalized (1 in the paper).

    Raises:
        ConfigError: ``k`` below 1.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(self, weight: float = 1e-4, k: int = 1) -> None:
        super().__init__(weight)
        if k < 1:
            raise ConfigError(f"k={k} must be at least 1: the number of singular values that are penalized")
        self.k = k

    def build(self, task: Task) -> LossTerm:
        """Sources against targets, on the features."""
        return pair_distance(task, self.name, ("features",), "roles", partial(_penalty, k=self.k))
