"""Learning-rate schedules as pure functions of the optimizer step.

A schedule maps (step, total) to the factor on every group's own learning rate. It knows nothing of epochs, of
accumulation or of which stages train, so it is right for a stage that thaws late.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from crossft.errors import ConfigError

__all__ = ["Constant", "Cosine", "Linear", "Schedule"]


class Schedule(ABC):
    """Base of the schedules: linear warmup to 1, then ``decay`` over the rest.

    Args:
        warmup: share of all optimizer steps (below 1) or number of optimizer steps (1 or more) of linear warmup.
        final: factor at the last step.
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        if warmup < 0:
            raise ConfigError(f"warmup={warmup} must be >= 0: a share below 1, or a number of optimizer steps")
        if not 0.0 <= final <= 1.0:
            raise ConfigError(f"final={final} must be in [0, 1]: the factor on the learning rate at the last step")
        self.warmup = warmup
        self.final = final

    def warmup_steps(self, total: int) -> int:
        """Optimizer steps of warmup in a run of ``total``."""
        return round(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.final + (1.0 - self.final) * self.decay(share)

    @abstractmethod
    def decay(self, share: float) -> float:
        """Factor in [0, 1] after this share of the steps that follow the warmup; 1 at 0."""


class Constant(Schedule):
    """The learning rate stays as it is after the warmup."""

    def decay(self, share: float) -> float:
        """Return 1."""
        return 1.0


class Linear(Schedule):
    """The learning rate falls linearly to ``final``."""

    def decay(self, share: float) -> float:
        """Return ``1 - share``."""
        return 1.0 - share


class Cosine(Schedule):
    """The learning rate falls along half a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    def decay(self, share: float) -> float:
        """Return ``(1 + cos(pi * share)) / 2``."""
        return 0.5 * (1.0 + math.cos(math.pi * share))
