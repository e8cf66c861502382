"""DANN: domain-adversarial training (Ganin et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crossft.callbacks.adaptation.discriminator import check_hidden, discriminator, discriminator_classes, domain_loss
from crossft.callbacks.adaptation.features import Layer, layer_of, width_of
from crossft.callbacks.adaptation.roles import Ids
from crossft.callbacks.base import MethodCallback
from crossft.functional import adversarial_strength, reverse_gradient
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["DANN", "DomainAdversarial"]


class DomainAdversarial(LossTerm):
    """Cross-entropy of a domain discriminator behind a gradient reversal (Ganin et al. 2016, eq. 9 and 18).

    The discriminator tells the rows of its classes apart: sources from targets, or (``multi``) every domain from every
    other. The loss is the mean over the classes of their means, so domains of unequal size count alike; with two it is
    half of the sum in eq. 9, as in the released code, whose batches hold as many rows of each.

    Args:
        num_features: width d of what the discriminator reads.
        classes: domain ids of each discriminator class.
        hidden: width of the two hidden layers.
        gamma: steepness of the schedule of lambda over total progress.
        layer: what the discriminator reads; default the pooled features.
        tokens: judge every token or spatial position instead of their mean.
    """

    def __init__(
        self,
        num_features: int,
        classes: list[Ids],
        hidden: int,
        gamma: float,
        layer: Layer | None = None,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.gamma, self.tokens = classes, gamma, tokens
        self.layer = layer or Layer("features")
        self.needs_stages = self.layer.stage
        self.needs_tokens = tokens and not self.needs_stages
        self.discriminator = discriminator(num_features, hidden, len(classes))
        self._last: Callable[[], dict[str, Tensor]] = dict

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over the discriminator's classes of the mean cross-entropy of their rows; a scalar."""
        strength = adversarial_strength(step.progress, self.gamma)
        value, mask = self.layer.tokens(step) if self.tokens else (self.layer.rows(step), None)
        logits = self.discriminator(reverse_gradient(value, strength))
        loss, state = domain_loss(step, logits, self.classes, mask=mask)
        device = step.batch.domains.device
        self._last = lambda: {**state(), "strength": torch.tensor(strength, device=device)}
        return loss

    def logs(self) -> dict[str, Tensor]:
        """Balanced accuracy of the discriminator and against chance, its loss over log k, and lambda."""
        return self._last()


class DANN(MethodCallback):
    """DANN (Ganin et al. 2016, Domain-Adversarial Training of Neural Networks).

    Needs source and (unlabeled) target rows in every batch. The strength follows lambda_p = 2 / (1 + exp(-10 p)) - 1
    over the share p of optimizer steps done, so it is the same under accumulation and after a resume.

    Args:
        weight: factor on the discriminator's loss (1 in the released code).
        hidden: width of the discriminator's hidden layers (1024 in the paper's appendix for images).
        gamma: steepness of the schedule (10 in section 5.2.2).
        multi: one discriminator class a domain instead of source against target.
        layer: ``features`` (what the head reads, as in the paper), or the name of a stage.
        tokens: judge every token or spatial position on its own; a row's loss is the mean over its real tokens.

    Raises:
        ConfigError: ``hidden`` below 1.
        StageError: ``layer`` is not a stage that the backbone can capture.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        hidden: int = 1024,
        gamma: float = 10.0,
        multi: bool = False,
        layer: str = "features",
        tokens: bool = False,
    ) -> None:
        super().__init__(weight)
        check_hidden(hidden)
        self.hidden, self.gamma, self.multi, self.layer, self.tokens = hidden, gamma, multi, layer, tokens

    def build(self, task: Task) -> LossTerm:
        """Build the discriminator over the task's source and target domains."""
        layer = layer_of(task, self.layer, allowed=("features",))
        classes = discriminator_classes(task, self.multi)
        width = width_of(task, layer, self.tokens)
        return DomainAdversarial(width, classes, self.hidden, self.gamma, layer, self.tokens)
