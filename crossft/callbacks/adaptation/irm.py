"""IRMv1: one classifier that is optimal for every source domain (Arjovsky et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.callbacks.adaptation.risks import early_factor, labeled_rows, source_logits
from crossft.callbacks.adaptation.roles import Ids, source_groups
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import scale_gradients, square_of_mean
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["IRM", "ScaleGradientNorm"]


class ScaleGradientNorm(LossTerm):
    """Mean over source domains of (d R_e(w z) / dw at w = 1)^2.

    Rows of all processes form one batch; under gradient accumulation each micro-batch is a batch of its own.

    Args:
        groups: ids of the source domains.
        unbiased: estimate the square from different rows.
        weight: what the task multiplies the term by; read for the start alone.
        anneal: share of training over which the whole factor is 1.
    """

    def __init__(self, groups: Ids, unbiased: bool, weight: float, anneal: float) -> None:
        super().__init__()
        self.groups, self.unbiased, self.weight, self.anneal = groups, unbiased, weight, anneal

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The penalty, a scalar."""
        each = [scale_gradients(step.per_sample_loss, z) for z in source_logits(step, model, self.groups)]
        groups = labeled_rows(step, self.groups, torch.stack(each).sum(0))
        penalty = torch.stack([square_of_mean(rows[0], self.unbiased) for rows in groups]).mean()
        return early_factor(self.weight, self.anneal, step.progress) * penalty


class IRM(MethodCallback):
    """IRMv1 (Arjovsky et al. 2019, Invariant Risk Minimization, section 3, eq. IRMv1).

    Objective: mean of the source risks + lambda * mean of the squared gradients of each risk by a scalar that
    multiplies the logits. The task loss is the mean over labeled rows, so it is the mean of the risks where every
    source has the same quota of a batch (``data.sampler: domain``) and only sources have labels. It works with any
    task loss. DomainBed starts with a weight of 1 and makes a new optimizer when it jumps; the optimizer stays here.

    Args:
        weight: lambda (100 in DomainBed).
        anneal: share of training over which lambda is 1 (0.1: 500 of 5000 steps in DomainBed).
        unbiased: the square from products of different rows (the paper's appendix D and DomainBed take two halves of
            the batch; here it is the mean over all pairs of rows); false: the square of the mean.

    Raises:
        ConfigError: ``anneal`` out of [0, 1], or fewer than two source domains.
    """

    needs_source = "labeled"

    def __init__(self, weight: float = 100.0, anneal: float = 0.1, unbiased: bool = True) -> None:
        super().__init__(weight)
        if not 0 <= anneal <= 1:
            raise ConfigError(f"anneal={anneal} must be in [0, 1]: a share of training")
        self.anneal, self.unbiased = anneal, unbiased

    def build(self, task: Task) -> LossTerm:
        """Find the source domains."""
        groups = source_groups(task, f"methods.{self.name}")
        return ScaleGradientNorm(groups, self.unbiased, self.weight, self.anneal)
