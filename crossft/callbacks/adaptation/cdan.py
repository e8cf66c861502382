"""CDAN: adversarial training on features conditioned on predictions (Long et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from crossft.callbacks.adaptation.discriminator import check_hidden, discriminator, discriminator_classes, domain_loss
from crossft.callbacks.adaptation.roles import Ids, class_count, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import (
    adversarial_strength,
    entropy,
    multilinear,
    randomized_multilinear,
    reverse_gradient,
    upcast,
)
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["CDAN", "ConditionalAdversarial"]

Map = Literal["auto", "multilinear", "randomized"]
LARGEST_PRODUCT = 4096
"""Above this d * k the randomized map is used (Long et al. 2018, section 3.1)."""


class ConditionalAdversarial(LossTerm):
    """Domain discriminator on f (x) g behind a gradient reversal (Long et al. 2018, eq. 2 to 4 and 6).

    g is the softmax of the head's logits, without gradient, as in the released code. With ``entropy`` each row's loss
    is multiplied by 1 + exp(-H(g)) without gradient (section 3.2, entropy conditioning). The released code divides
    these factors by their sum over the batch, and lets the reversed gradient through the factors before that; here they
    stay as in the equation, as weights, so a row counts the same in any batch.

    Args:
        num_features: width d of the features.
        num_classes: k.
        classes: domain ids of each discriminator class.
        head: key of the head whose predictions condition the features.
        hidden: width of the two hidden layers.
        gamma: steepness of the schedule of lambda.
        entropy: weigh rows by how sure their prediction is (CDAN+E).
        random_dim: width r of the randomized map; None for the full outer product.
    """

    project_features: Tensor
    project_predictions: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        classes: list[Ids],
        head: str,
        hidden: int,
        gamma: float,
        entropy: bool,
        random_dim: int | None,
    ) -> None:
        super().__init__()
        self.classes, self.head, self.gamma, self.entropy = classes, head, gamma, entropy
        self.randomized = random_dim is not None
        if random_dim is not None:
            self.register_buffer("project_features", torch.randn(num_features, random_dim))
            self.register_buffer("project_predictions", torch.randn(num_classes, random_dim))
        self.discriminator = discriminator(random_dim or num_features * num_classes, hidden, len(classes))
        self._last: Callable[[], dict[str, Tensor]] = dict

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers that never change during a run."""
        return tuple(name for name, _ in self.named_buffers())

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over the discriminator's classes of the mean weighted cross-entropy of their rows; a scalar."""
        strength = adversarial_strength(step.progress, self.gamma)
        logits = upcast(step.logits[self.head].detach())
        features = reverse_gradient(step.features, strength)
        g = F.softmax(logits, 1).to(features.dtype)
        if self.randomized:
            joint = randomized_multilinear(features, g, self.project_features, self.project_predictions)
        else:
            joint = multilinear(features, g)
        weights = 1.0 + torch.exp(-entropy(logits)) if self.entropy else None
        loss, state = domain_loss(step, self.discriminator(joint), self.classes, weights)
        device = step.batch.domains.device
        self._last = lambda: {**state(), "strength": torch.tensor(strength, device=device)}
        return loss

    def logs(self) -> dict[str, Tensor]:
        """Balanced accuracy of the discriminator and against chance, its loss over log k, and lambda."""
        return self._last()


class CDAN(MethodCallback):
    """CDAN (eq. 9) and CDAN+E (eq. 10 of Long et al. 2018, Conditional Adversarial Domain Adaptation).

    Needs source and (unlabeled) target rows in every batch, and one label space for both.

    Args:
        weight: factor on the discriminator's loss (1 in the paper).
        entropy: CDAN+E: rows with sure predictions count more.
        map: ``multilinear`` (d * k wide), ``randomized``, or ``auto``: randomized where d * k > 4096, as in the paper.
        random_dim: width of the randomized map (1024 in the released code).
        hidden: width of the discriminator's hidden layers (1024 in the released code).
        gamma: steepness of the schedule of lambda (10, as for DANN).
        multi: one discriminator class a domain instead of source against target.

    Raises:
        ConfigError: an argument out of range, or source and target have different label spaces.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        entropy: bool = False,
        map: Map = "auto",
        random_dim: int = 1024,
        hidden: int = 1024,
        gamma: float = 10.0,
        multi: bool = False,
    ) -> None:
        super().__init__(weight)
        check_hidden(hidden)
        if map not in get_args(Map):
            raise ConfigError(f"map={map!r} is unknown; allowed: {', '.join(get_args(Map))}")
        if random_dim < 1:
            raise ConfigError(f"random_dim={random_dim} must be at least 1: the width of the randomized map")
        self.entropy, self.map, self.random_dim = entropy, map, random_dim
        self.hidden, self.gamma, self.multi = hidden, gamma, multi

    def build(self, task: Task) -> LossTerm:
        """Build the discriminator, and draw the random maps where they are used."""
        head = shared_head(task, f"methods.{self.name}")
        d = task.backbone.num_features
        k = class_count(task, head, f"methods.{self.name}")
        randomized = self.map == "randomized" or (self.map == "auto" and d * k > LARGEST_PRODUCT)
        return ConditionalAdversarial(
            d,
            k,
            discriminator_classes(task, self.multi),
            head,
            self.hidden,
            self.gamma,
            self.entropy,
            self.random_dim if randomized else None,
        )
