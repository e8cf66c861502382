"""SMART: predictions that do not move under the worst small change at the input (Jiang et al. 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crossft.callbacks.retention.r3f import R3F, NoisyAgreement
from crossft.errors import ConfigError
from crossft.functional.distillation import symmetric_kl
from crossft.tasks import Task
from crossft.types import HasBackbone, StepOutput

__all__ = ["SMART", "WorstAgreement"]


class WorstAgreement(NoisyAgreement):
    """Symmetric divergence between the predictions on x and on x with a change that was made to raise it.

    Args:
        noisy: the term whose noise the ascent starts at; its settings are taken over.
        radius: largest change of an element.
        step_size: of the ascent.
        steps: of the ascent.
    """

    def __init__(self, noisy: NoisyAgreement, radius: float, step_size: float, steps: int) -> None:
        super().__init__(
            noisy.needs_stages[0],
            noisy.second,
            noisy.head,
            noisy.kind,
            noisy.ids,
            noisy.epsilon,
            noisy.noise,
            noisy.seed,
        )
        self.radius, self.step_size, self.steps = radius, step_size, steps

    def _drawn(self, value: Tensor, step: StepOutput) -> Tensor:
        return super()._drawn(value, step).clamp(-self.radius, self.radius)

    def _apart(self, value: Tensor, clean: Tensor, step: StepOutput, model: HasBackbone) -> Tensor:
        change = self._drawn(value, step)
        for _ in range(self.steps):
            change = self._raised(change, value.detach(), clean.detach(), step, model)
        logits = self._logits(value + change, step, model)
        return step.mean(symmetric_kl(clean, logits, self.kind), self.ids)

    def _raised(self, change: Tensor, value: Tensor, clean: Tensor, step: StepOutput, model: HasBackbone) -> Tensor:
        """One step along each row's gradient, over its largest element, cut off at the radius."""
        change = change.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(value + change, step, model)
            apart = symmetric_kl(clean, logits, self.kind).sum()
        (gradient,) = torch.autograd.grad(apart, change)
        largest = gradient.flatten(1).abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        direction = gradient / largest.view(-1, *[1] * (gradient.ndim - 1))
        return (change.detach() + self.step_size * direction).clamp(-self.radius, self.radius)


class SMART(R3F):
    """SMART's smoothness term (Jiang et al. 2020, SMART, eq. 1 and 2, and the ascent of algorithm 1).

    The change is made at the output of the backbone's first stage: the word embeddings of text, as published, the
    stem's output of an image network. It starts at noise, as in ``R3F``, and takes ``steps`` steps of gradient ascent
    on the divergence, in the norm of the largest element; a forward and a backward of the network each, without a
    gradient for any weight. The Bregman proximal term of eq. 3 is not part of it; ``LwF`` and ``MeanTeacher`` hold
    predictions near those of other weights. Needs no source data.

    Args:
        weight: lambda (1, 3 or 5 in section 5.1).
        epsilon: largest change of an element (1e-5 there).
        sigma: standard deviation, or half width, of the noise at the start (1e-5 there).
        step_size: eta of the ascent (1e-3 there).
        steps: of the ascent (1 there).
        noise: ``normal`` or ``uniform``.

    Raises:
        ConfigError: a size is not positive, ``steps`` is below 1, or the backbone cannot start from its second stage.
    """

    def __init__(
        self,
        weight: float = 1.0,
        epsilon: float = 1e-5,
        sigma: float = 1e-5,
        step_size: float = 1e-3,
        steps: int = 1,
        noise: Literal["normal", "uniform"] = "normal",
    ) -> None:
        super().__init__(weight, epsilon, noise)
        for name, value in (("sigma", sigma), ("step_size", step_size)):
            if value <= 0.0:
                raise ConfigError(f"{name}={value} must be positive")
        if steps < 1:
            raise ConfigError(f"steps={steps} must be at least 1; without an ascent it is R3F")
        self.radius, self.epsilon = epsilon, sigma  # what R3F builds takes the noise from epsilon
        self.step_size, self.steps = step_size, steps

    def build(self, task: Task) -> WorstAgreement:
        """Compare predictions of the target's head on target rows."""
        return WorstAgreement(super().build(task), self.radius, self.step_size, self.steps)
