"""MCC: minimum class confusion on target predictions (Jin et al. 2020)."""

from __future__ import annotations

from functools import partial

from crossft.callbacks.adaptation.roles import ids_of, shared_head
from crossft.callbacks.adaptation.target import TargetBatchLoss
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import minimum_class_confusion
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["MCC"]


class MCC(MethodCallback):
    """MCC (Jin et al. 2020, Minimum Class Confusion for Versatile Domain Adaptation, eq. 1 to 8).

    Reads target rows alone, without labels; target rows of all processes form one batch. Under gradient accumulation
    each micro-batch is a batch of its own.

    Args:
        weight: mu (1 in the paper).
        temperature: of the softmax (2.5 in the paper's main tables).

    Raises:
        ConfigError: ``temperature`` not positive, or targets with different label spaces.
    """

    needs_target = "unlabeled"

    def __init__(self, weight: float = 1.0, temperature: float = 2.5) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise ConfigError(f"temperature={temperature} must be positive; larger makes predictions softer")
        self.temperature = temperature

    def build(self, task: Task) -> LossTerm:
        """Find the targets and their head."""
        head = shared_head(task, f"methods.{self.name}", ("target",))
        return TargetBatchLoss(
            ids_of(task, "target"), head, partial(minimum_class_confusion, temperature=self.temperature)
        )
