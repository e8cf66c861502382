"""MCD: maximum classifier discrepancy, in its one-step form by gradient reversal (Saito et al. 2018)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.adaptation.roles import Ids, class_count, ids_of, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import adversarial_strength, classifier_discrepancy, reverse_gradient, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["MCD", "ClassifierDiscrepancy"]


class ClassifierDiscrepancy(LossTerm):
    """A second head: cross-entropy on labeled rows minus the discrepancy of both heads on target rows.

    The discrepancy is taken behind a gradient reversal, so that in one step the heads make it large and the features
    small (Saito et al. 2018, eq. 4 to 6; the one-step form with a gradient reversal layer is in the paper's
    supplement). The task's head runs a second time on the target features: its dropout draws there from a copy of the
    generator, so no other draw moves.

    Args:
        second: the second head, like the task's, with other initial weights.
        targets: ids of the target domains.
        head: key of the task's head.
        labeled: ids of the domains that the head learns.
        strength: largest lambda of the reversal.
        gamma: steepness of its schedule.
    """

    def __init__(self, second: nn.Module, targets: Ids, head: str, labeled: Ids, strength: float, gamma: float) -> None:
        super().__init__()
        self.second = second
        self.targets, self.head, self.labeled = targets, head, labeled
        self.strength, self.gamma = strength, gamma
        self._last: dict[str, Tensor] = {}

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Second head's mean cross-entropy minus the mean discrepancy, a scalar."""
        strength = self.strength * adversarial_strength(step.progress, self.gamma)
        reversed_features = reverse_gradient(step.features, strength)
        cuda = [step.features.device] if step.features.is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            own = self.second(step.features)
            one, two = model.heads[self.head](reversed_features), self.second(reversed_features)
        discrepancy = step.mean(classifier_discrepancy(upcast(one), upcast(two)), self.targets)
        self._last = {"discrepancy": discrepancy.detach(), "strength": discrepancy.new_tensor(strength)}
        return self._supervised(step, upcast(own)) - discrepancy

    def _supervised(self, step: StepOutput, logits: Tensor) -> Tensor:
        """Mean cross-entropy over labeled rows, as the task's own."""
        rows = step.batch.labeled & step.rows(self.labeled)
        labels = torch.where(rows, step.batch.targets, torch.zeros_like(step.batch.targets))
        losses = F.cross_entropy(logits, labels, reduction="none")
        kept = torch.where(rows, losses, torch.zeros_like(losses))
        return kept.sum() / max(step.batch.labeled_quota, 1e-12)

    def logs(self) -> dict[str, Tensor]:
        """Mean discrepancy of the two heads on the target rows, and lambda."""
        return self._last


class MCD(MethodCallback):
    """MCD (Saito et al. 2018, Maximum Classifier Discrepancy for Unsupervised Domain Adaptation), one-step form.

    The paper alternates three steps, with the features updated several times a batch; this is the single step with a
    gradient reversal. The second head is the term's own and is discarded after training: predictions are the task's
    head's alone (the paper's code adds both).

    Args:
        weight: factor on the second head's loss and the discrepancy together (1 in the paper).
        strength: largest lambda of the gradient reversal.
        gamma: steepness of lambda's schedule over total progress (as for DANN).

    Raises:
        ConfigError: ``strength`` negative, or source and target have different label spaces or one class.
    """

    needs_source = "labeled"
    needs_target = "unlabeled"

    def __init__(self, weight: float = 1.0, strength: float = 1.0, gamma: float = 10.0) -> None:
        super().__init__(weight)
        if strength < 0:
            raise ConfigError(f"strength={strength} must be >= 0: the largest factor of the gradient reversal")
        self.strength, self.gamma = strength, gamma

    def build(self, task: Task) -> LossTerm:
        """Build a second head with initial weights of its own."""
        head = shared_head(task, f"methods.{self.name}")
        class_count(task, head, f"methods.{self.name}")
        second = copy.deepcopy(task.heads[head])
        for module in second.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        labeled = tuple(i for i, d in enumerate(task.domains) if task.head_keys[d.name] == head)
        return ClassifierDiscrepancy(second, ids_of(task, "target"), head, labeled, self.strength, self.gamma)
