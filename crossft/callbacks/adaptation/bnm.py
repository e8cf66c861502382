"""BNM: batch nuclear-norm maximization on target predictions (Cui et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from crossft.callbacks.adaptation.roles import ids_of, shared_head
from crossft.callbacks.adaptation.target import TargetBatchLoss
from crossft.callbacks.base import MethodCallback
from crossft.functional import batch_nuclear_norm
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["BNM"]


def _negative(logits: Tensor) -> Tensor:
    return -batch_nuclear_norm(logits)


class BNM(MethodCallback):
    """BNM (Cui et al. 2020, Towards Discriminability and Diversity: Batch Nuclear-Norm Maximization, section 3).

    Minus the nuclear norm of the matrix of target predictions, divided by its rows. Target rows of all processes form
    one batch; under gradient accumulation each micro-batch is a batch of its own.

    Args:
        weight: lambda (1 in the released code, which divides by the number of singular values, not by the rows).

    Raises:
        ConfigError: targets with different label spaces.
    """

    needs_target = "unlabeled"

    def build(self, task: Task) -> LossTerm:
        """Find the targets and their head."""
        return TargetBatchLoss(
            ids_of(task, "target"), shared_head(task, f"methods.{self.name}", ("target",)), _negative
        )
