"""GroupDRO: the worst source domain counts most (Sagawa et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.callbacks.adaptation.risks import domain_risks
from crossft.callbacks.adaptation.roles import Ids, source_groups
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import mean_over_processes, update_group_weights
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["GroupDRO", "GroupWeights"]


class GroupWeights(LossTerm):
    """sum_g q_g R_g of the source domains, minus what the task loss already holds of them.

    The task loss counts source domain g with the share a_g of its labeled rows, so
    task loss + term = sum_g a q_g R_g + (labeled rows of other domains), with a = sum_g a_g, which is 1 where only
    sources have labels: then task loss + 1 * term is exactly the objective of algorithm 1.

    q_g is multiplied by exp(eta R_g) once per optimizer step, with the risks of this step, then normalized. Under
    gradient accumulation a micro-batch sees the risks of the micro-batches so far.

    Args:
        groups: ids of the source domains.
        eta: step size of q.
    """

    weights: Tensor
    sums: Tensor
    count: Tensor
    clock: Tensor

    def __init__(self, groups: Ids, eta: float) -> None:
        super().__init__()
        self.groups, self.eta = groups, eta
        self.register_buffer("weights", torch.full((len(groups),), 1.0 / len(groups)))
        self.register_buffer("sums", torch.zeros(len(groups)))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("clock", torch.tensor(-1))

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The term, a scalar."""
        risks = domain_risks(step, self.groups)
        q = self._update(step.batch.step, risks.detach()).to(risks.dtype)
        shares = risks.new_tensor([step.batch.quota[g] for g in self.groups]) / max(step.batch.labeled_quota, 1e-12)
        return ((shares.sum() * q - shares) * risks).sum()

    @torch.no_grad()
    def _update(self, number: int, risks: Tensor) -> Tensor:
        """q for this micro-batch; the steps before are taken in for good."""
        if number != int(self.clock):
            self.weights.copy_(self._current())
            self.sums.zero_()
            self.count.zero_()
            self.clock.fill_(number)
        self.sums += mean_over_processes(risks).to(self.sums.dtype)
        self.count += 1
        return self._current()

    def _current(self) -> Tensor:
        if int(self.count) == 0:
            return self.weights
        return update_group_weights(self.weights, self.sums / self.count, self.eta)

    def logs(self) -> dict[str, Tensor]:
        """q of each source domain by its id."""
        return {f"q{g}": q for g, q in zip(self.groups, self._current(), strict=True)}


class GroupDRO(MethodCallback):
    """GroupDRO (Sagawa et al. 2020, Distributionally Robust Neural Networks for Group Shifts, algorithm 1).

    Groups are the source domains. At weight 1, and where only sources have labels, the objective is sum_g q_g R_g:
    the term is that sum minus the task loss (so at another weight w it is (1 - w) * task loss + w * that sum). The
    paper adds strong weight decay or early stopping; set them in the optimizer and the trainer.

    Args:
        weight: 1 for the published objective.
        eta: step size of the group weights (0.01 in the paper and in DomainBed).

    Raises:
        ConfigError: ``eta`` negative, or fewer than two source domains.
    """

    needs_source = "labeled"

    def __init__(self, weight: float = 1.0, eta: float = 0.01) -> None:
        super().__init__(weight)
        if eta < 0:
            raise ConfigError(f"eta={eta} must be >= 0; 0 keeps all groups at the same weight")
        self.eta = eta

    def build(self, task: Task) -> LossTerm:
        """One weight a source domain."""
        return GroupWeights(source_groups(task, f"methods.{self.name}"), self.eta)
