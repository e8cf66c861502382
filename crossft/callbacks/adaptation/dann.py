"""DANN: domain-adversarial training (Ganin et al. 2016)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import adversarial_strength, reverse_gradient
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["DANN", "DomainAdversarial"]


class DomainAdversarial(LossTerm):
    """Cross-entropy of a domain discriminator behind a gradient reversal (Ganin et al. 2016, eq. 9 and 18).

    The discriminator tells source from target rows; with several sources or targets, every domain from every other.
    The loss is the mean of the per-domain means, so domains of unequal size count alike.

    Args:
        num_features: width d of the features.
        classes: domain ids of each discriminator class.
        hidden: width of the two hidden layers.
        gamma: steepness of the schedule of lambda over total progress.
    """

    def __init__(self, num_features: int, classes: list[tuple[int, ...]], hidden: int, gamma: float) -> None:
        super().__init__()
        self.classes, self.gamma = classes, gamma
        self.discriminator = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, len(classes)),
        )
        self._last: dict[str, Tensor] = {}

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over the discriminator's classes of the mean cross-entropy of their rows; a scalar."""
        strength = adversarial_strength(step.progress, self.gamma)
        logits = self.discriminator(reverse_gradient(step.features, strength)).float()
        loss = logits.sum() * 0.0
        right = loss.detach()
        for index, ids in enumerate(self.classes):
            labels = step.batch.domains.new_full((len(logits),), index)
            loss = loss + step.mean(F.cross_entropy(logits, labels, reduction="none"), ids) / len(self.classes)
            right = right + step.mean((logits.argmax(1) == index).float(), ids) / len(self.classes)
        self._last = {"accuracy": right, "strength": right.new_tensor(strength)}
        return loss

    def logs(self) -> dict[str, Tensor]:
        """Balanced accuracy of the discriminator (chance: 1 / classes) and lambda."""
        return self._last


class DANN(MethodCallback):
    """DANN (Ganin et al. 2016, Domain-Adversarial Training of Neural Networks).

    Needs source and (unlabeled) target rows in every batch. The strength follows lambda_p = 2 / (1 + exp(-10 p)) - 1
    over the share p of optimizer steps done, so it is the same under accumulation and after a resume.

    Args:
        weight: factor on the discriminator's loss (1 in the paper).
        hidden: width of the discriminator's hidden layers (1024 in the paper's appendix for images).
        gamma: steepness of the schedule (10 in section 5.2.2).
        multi: one discriminator class a domain instead of source against target.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(self, weight: float = 1.0, hidden: int = 1024, gamma: float = 10.0, multi: bool = False) -> None:
        super().__init__(weight)
        if hidden < 1:
            raise ConfigError(f"hidden={hidden} must be at least 1: the width of the discriminator's hidden layers")
        self.hidden, self.gamma, self.multi = hidden, gamma, multi

    def build(self, task: Task) -> LossTerm:
        """Build the discriminator over the task's source and target domains."""
        ids: dict[Any, list[int]] = {"source": [], "target": []}
        for i, domain in enumerate(task.domains):
            if domain.role in ids:
                ids[domain.role].append(i)
        groups = [[i] for role in ids.values() for i in role] if self.multi else list(ids.values())
        classes = [tuple(group) for group in groups]
        return DomainAdversarial(task.backbone.num_features, classes, self.hidden, self.gamma)
