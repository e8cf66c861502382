"""Learning-rate schedules as functions of the optimizer step.

A schedule maps (step, total) to the factor on every group's own learning rate. It knows nothing of epochs, of
accumulation or of which stages train, so it is right for a stage that thaws late.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from crossft.errors import ConfigError

__all__ = [
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Linear",
    "OneCycle",
    "Schedule",
    "SlantedTriangular",
    "WarmedUp",
    "finite_steps",
]


def finite_steps(steps: float) -> int:
    """The optimizer steps of a fit, which every schedule is a function of.

    Raises:
        ConfigError: ``steps`` is infinite.
    """
    if math.isinf(steps):
        raise ConfigError(
            "trainer.max_epochs=-1 with max_steps=-1 never ends, and schedules need an end; set one of them to 1 or "
            "more"
        )
    return int(steps)


class Schedule(ABC):
    """Base of the schedules."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""

    def observe(self, metrics: Mapping[str, Any]) -> None:  # noqa: B027  # most have nothing to see
        """See what a validation within a fit has measured; most schedules read the step alone."""

    def restart(self) -> None:  # noqa: B027  # most remember nothing
        """Forget what validations have shown, so that it begins anew."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have no state
        """Restore what ``state_dict`` returned."""


def _steps(warmup: float, total: int) -> int:
    return round(warmup * total) if warmup < 1 else int(warmup)


def _checked_warmup(warmup: float) -> float:
    if warmup < 0:
        raise ConfigError(f"warmup={warmup} must be >= 0: a share below 1, or a number of optimizer steps")
    return warmup


class WarmedUp(Schedule):
    """Linear warmup to 1, then ``decay`` over the rest.

    Args:
        warmup: share of all optimizer steps (below 1) or number of optimizer steps (1 or more) of linear warmup.
        final: factor at the last step.

    Raises:
        ConfigError: ``warmup`` is negative or ``final`` outside [0, 1].
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        if not 0.0 <= final <= 1.0:
            raise ConfigError(f"final={final} must be in [0, 1]: the factor on the learning rate at the last step")
        self.warmup = _checked_warmup(warmup)
        self.final = final

    def warmup_steps(self, total: int) -> int:
        """Optimizer steps of warmup in a run of ``total``."""
        return _steps(self.warmup, total)

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


class Constant(WarmedUp):
    """The learning rate stays as it is after the warmup."""

    def decay(self, share: float) -> float:
        """Return 1."""
        return 1.0


class Linear(WarmedUp):
    """The learning rate falls linearly to ``final``."""

    def decay(self, share: float) -> float:
        """Return ``1 - share``."""
        return 1.0 - share


class Cosine(WarmedUp):
    """The learning rate falls along half a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    def decay(self, share: float) -> float:
        """Return ``(1 + cos(pi * share)) / 2``."""
        return 0.5 * (1.0 + math.cos(math.pi * share))


class InverseSqrt(Schedule):
    """Linear warmup to 1, then the inverse square root of the step (Vaswani et al. 2017, eq. 3).

    With w steps of warmup the factor at the 1-based step s is ``min(s / w, sqrt(w / s))``: eq. 3 scaled to 1 at its
    peak. It has no end, so a longer run only adds to its tail.

    Args:
        warmup: share of all optimizer steps (below 1) or number of them; 0 is the same as 1 step.

    Raises:
        ConfigError: ``warmup`` is negative.
    """

    def __init__(self, warmup: float = 0.1) -> None:
        self.warmup = _checked_warmup(warmup)

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""
        warmup = max(1, _steps(self.warmup, total))
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


class SlantedTriangular(Schedule):
    """A short linear rise and a long linear fall (Howard & Ruder 2018, eq. 3).

    With T steps, ``cut = floor(T * cut_frac)`` and the 0-based step t: ``p = t / cut`` before the cut, then
    ``p = 1 - (t - cut) / (cut * (1 / cut_frac - 1))``; the factor is ``(1 + p * (ratio - 1)) / ratio``. Where T
    does not divide evenly, p is kept in [0, 1], which the equation leaves to the reader.

    Args:
        cut_frac: share of the steps in which the learning rate rises (0.1: the paper's value).
        ratio: how much smaller the lowest learning rate is than the highest (32: the paper's value).

    Raises:
        ConfigError: ``cut_frac`` is outside (0, 1) or ``ratio`` below 1.
    """

    def __init__(self, cut_frac: float = 0.1, ratio: float = 32.0) -> None:
        if not 0.0 < cut_frac < 1.0:
            raise ConfigError(f"cut_frac={cut_frac} must be in (0, 1): the share of steps in which the rate rises")
        if ratio < 1.0:
            raise ConfigError(f"ratio={ratio} must be at least 1: highest over lowest learning rate")
        self.cut_frac, self.ratio = cut_frac, ratio

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""
        cut = max(1, math.floor(total * self.cut_frac))
        p = step / cut if step < cut else 1.0 - (step - cut) / (cut * (1.0 / self.cut_frac - 1.0))
        return (1.0 + min(1.0, max(0.0, p)) * (self.ratio - 1.0)) / self.ratio


class OneCycle(Schedule):
    """Half a cosine up, half a cosine down to almost nothing (Smith & Topin 2018; torch's ``OneCycleLR``).

    The factor is 1 at the peak, so a group's learning rate is its maximum. Momentum is not cycled.

    Args:
        rise: share of the steps in which the learning rate rises (0.3: torch's default).
        div: how much smaller the first learning rate is than the highest (25: torch's default).
        final_div: how much smaller the last is than the first (1e4: torch's default).

    Raises:
        ConfigError: ``rise`` is outside (0, 1), or a divisor below 1.
    """

    def __init__(self, rise: float = 0.3, div: float = 25.0, final_div: float = 1e4) -> None:
        if not 0.0 < rise < 1.0:
            raise ConfigError(f"rise={rise} must be in (0, 1): the share of steps in which the rate rises")
        for name, value in (("div", div), ("final_div", final_div)):
            if value < 1.0:
                raise ConfigError(f"{name}={value} must be at least 1: the rate would rise where it should fall")
        self.rise, self.div, self.final_div = rise, div, final_div

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""
        peak, last = self.rise * total - 1.0, total - 1.0
        first, final = 1.0 / self.div, 1.0 / (self.div * self.final_div)
        if step <= peak:
            return _half_cosine(first, 1.0, step / peak if peak > 0 else 1.0)
        return _half_cosine(1.0, final, min(1.0, (step - peak) / max(1.0, last - peak)))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
