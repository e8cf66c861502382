"""Entropy minimization on target predictions (Grandvalet & Bengio 2005)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.callbacks.adaptation.roles import Ids, ids_of, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.functional import entropy, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["EntropyMinimization", "TargetEntropy"]


class TargetEntropy(LossTerm):
    """Mean over target rows of the entropy of their prediction, 0 for rows that have a label.

    Args:
        targets: ids of the target domains.
        head: key of their head.
    """

    def __init__(self, targets: Ids, head: str) -> None:
        super().__init__()
        self.targets, self.head = targets, head

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The mean entropy in nats, a scalar."""
        values = entropy(upcast(step.logits[self.head]))
        return step.mean(torch.where(step.batch.labeled, torch.zeros_like(values), values), self.targets)


class EntropyMinimization(MethodCallback):
    """Entropy minimization (Grandvalet & Bengio 2005, Semi-supervised Learning by Entropy Minimization, section 2.2).

    Args:
        weight: lambda (the paper chooses it by cross-validation; 0.1 is a cautious start).

    Raises:
        ConfigError: targets with different label spaces.
    """

    needs_target = "unlabeled"

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__(weight)

    def build(self, task: Task) -> LossTerm:
        """Find the targets and their head."""
        head = shared_head(task, f"methods.{self.name}", ("target",))
        return TargetEntropy(ids_of(task, "target"), head)
