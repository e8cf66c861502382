"""MDD: margin disparity discrepancy (Zhang et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.adaptation.discriminator import check_hidden
from crossft.callbacks.adaptation.roles import Ids, class_count, ids_of, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import adversarial_strength, log_not, reverse_gradient, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["MDD", "MarginDisparity"]


class MarginDisparity(LossTerm):
    """An adversarial head that agrees with the task's head on the source and disagrees on the target.

    margin * E_s[-log p'_y] + E_t[-log(1 - p'_y)] with y the class that the task's head predicts, behind a gradient
    reversal: the adversarial head makes it small, the features large (Zhang et al. 2019, section 4: the combined
    cross-entropy losses). Nothing flows into the task's head.

    Args:
        num_features: width d of the features.
        num_classes: k.
        sources: ids of the source domains.
        targets: ids of the target domains.
        head: key of the task's head.
        hidden: width of the adversarial head.
        margin: gamma of the paper.
        strength: largest lambda of the reversal.
        gamma: steepness of its schedule.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        sources: Ids,
        targets: Ids,
        head: str,
        hidden: int,
        margin: float,
        strength: float,
        gamma: float,
    ) -> None:
        super().__init__()
        self.sources, self.targets, self.head = sources, targets, head
        self.margin, self.strength, self.gamma = margin, strength, gamma
        self.adversary = nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        self._last: dict[str, Tensor] = {}

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The discrepancy's cross-entropies, a scalar."""
        strength = self.strength * adversarial_strength(step.progress, self.gamma)
        logits = upcast(self.adversary(reverse_gradient(step.features, strength)))
        labels = step.logits[self.head].detach().argmax(1)
        agree = step.mean(F.cross_entropy(logits, labels, reduction="none"), self.sources)
        disagree = step.mean(-log_not(logits, labels), self.targets)
        same = (logits.detach().argmax(1) == labels).to(logits.dtype)
        self._last = {
            "agreement_source": step.mean(same, self.sources),
            "agreement_target": step.mean(same, self.targets),
            "strength": same.new_tensor(strength),
        }
        return self.margin * agree + disagree + logits.sum() * 0.0

    def logs(self) -> dict[str, Tensor]:
        """Share of source and target rows on which both heads agree, and lambda."""
        return self._last


class MDD(MethodCallback):
    """MDD (Zhang et al. 2019, Bridging Theory and Algorithm for Domain Adaptation, section 4, eq. 30).

    The extra head is the term's own, discarded after training. The released code shifts 1 - p'_y by 1e-6 inside the
    logarithm; here log(1 - p'_y) is computed from the logits, exactly.

    Args:
        weight: eta, factor on the whole term (1 in the released code).
        margin: gamma (4 in the paper's main tables).
        hidden: width of the adversarial head's hidden layer (1024 in the released code).
        strength: largest lambda of the gradient reversal (0.1 in the released code).
        gamma: steepness of lambda's schedule over total progress (as for DANN; the released code's is 1 for every 1,000
            iterations and knows no end, so it is flatter in runs below 10,000).

    Raises:
        ConfigError: an argument out of range, or source and target have different label spaces or one class.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 4.0,
        hidden: int = 1024,
        strength: float = 0.1,
        gamma: float = 10.0,
    ) -> None:
        super().__init__(weight)
        check_hidden(hidden)
        if margin <= 0:
            raise ConfigError(f"margin={margin} must be positive: the weight of the source's part")
        if strength < 0:
            raise ConfigError(f"strength={strength} must be >= 0: the largest factor of the gradient reversal")
        self.margin, self.hidden, self.strength, self.gamma = margin, hidden, strength, gamma

    def build(self, task: Task) -> LossTerm:
        """Build the adversarial head over the shared label space."""
        head = shared_head(task, f"methods.{self.name}")
        return MarginDisparity(
            task.backbone.num_features,
            class_count(task, head, f"methods.{self.name}"),
            ids_of(task, "source"),
            ids_of(task, "target"),
            head,
            self.hidden,
            self.margin,
            self.strength,
            self.gamma,
        )
