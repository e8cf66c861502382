"""VREx: equal risks over source domains (Krueger et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from crossft.callbacks.adaptation.risks import domain_risks, early_factor
from crossft.callbacks.adaptation.roles import Ids, source_groups
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import mean_over_processes
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["RiskVariance", "VREx"]


class RiskVariance(LossTerm):
    """Variance of the risks of the source domains (over their number, as in DomainBed).

    Risks are of all processes together; under gradient accumulation each micro-batch has risks of its own.

    Args:
        groups: ids of the source domains.
        weight: what the task multiplies the term by; read for the start alone.
        anneal: share of training over which the whole factor is 1.
    """

    def __init__(self, groups: Ids, weight: float, anneal: float) -> None:
        super().__init__()
        self.groups, self.weight, self.anneal = groups, weight, anneal

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The variance, a scalar."""
        present = tuple(g for g in self.groups if step.batch.quota[g] > 0)
        if not present:
            return step.per_sample_loss.sum() * 0.0
        risks = mean_over_processes(domain_risks(step, present))
        return early_factor(self.weight, self.anneal, step.progress) * risks.var(correction=0)


class VREx(MethodCallback):
    """VREx (Krueger et al. 2021, Out-of-Distribution Generalization via Risk Extrapolation, eq. 8).

    Objective: mean of the source risks + beta * their variance. The task loss is the mean over labeled rows, so it is
    the mean of the risks where every source has the same quota of a batch (``data.sampler: domain``) and only sources
    have labels. The paper sums the risks; for G sources its beta is G times the one here. DomainBed starts with a
    weight of 1 and makes a new optimizer when it jumps; the optimizer stays here.

    Args:
        weight: beta (10 in DomainBed).
        anneal: share of training over which beta is 1 (0.1: 500 of 5000 steps in DomainBed).

    Raises:
        ConfigError: ``anneal`` out of [0, 1], or fewer than two source domains.
    """

    needs_source = "labeled"

    def __init__(self, weight: float = 10.0, anneal: float = 0.1) -> None:
        super().__init__(weight)
        if not 0 <= anneal <= 1:
            raise ConfigError(f"anneal={anneal} must be in [0, 1]: a share of training")
        self.anneal = anneal

    def build(self, task: Task) -> LossTerm:
        """Find the source domains."""
        return RiskVariance(source_groups(task, f"methods.{self.name}"), self.weight, self.anneal)
