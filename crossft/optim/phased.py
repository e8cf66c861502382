"""A schedule over phases: kept, warmed up again or restarted where one begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from crossft.optim.schedules import Schedule

__all__ = ["Phased", "Rates", "reset_moments_", "set_rates_"]

Rates = Literal["keep", "rewarm", "restart"]
"""``keep``: the run's schedule goes on. ``rewarm``: it goes on under a new linear warmup. ``restart``: it begins anew
and ends with the phase."""


class Phased(Schedule):
    """The run's schedule, seen from the phase that trains now.

    Every group is in the optimizer from the start, so a stage that thaws late takes part from its first step.

    Args:
        base: the run's schedule.
    """

    def __init__(self, base: Schedule) -> None:
        self.base = base
        self.resume(0, None)

    def begin(
        self, start: int, length: int | None, rates: Rates = "keep", warmup: int = 0, factor: float = 1.0
    ) -> None:
        """Begin a phase; under ``restart`` the run's schedule forgets what it has seen of validations.

        Args:
            start: its first optimizer step.
            length: its optimizer steps, which ``restart`` stretches the schedule over; None: to the end of the run.
            rates: what becomes of the schedule.
            warmup: optimizer steps of the new warmup under ``rewarm``.
            factor: on every learning rate of the phase.
        """
        self.resume(start, length, rates, warmup, factor)
        if rates == "restart":
            self.base.restart()

    def resume(
        self, start: int, length: int | None, rates: Rates = "keep", warmup: int = 0, factor: float = 1.0
    ) -> None:
        """Go on within a phase that has begun, as after a restored checkpoint; arguments as for ``begin``."""
        self.start, self.length, self.rates, self.warmup, self.factor = start, length, rates, warmup, factor

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step`` (0-based) of ``total``."""
        local = max(0, step - self.start)
        if self.rates == "restart":
            return self.factor * self.base(local, self.length or max(1, total - self.start))
        value = self.factor * self.base(step, total)
        return value * (local + 1) / (self.warmup + 1) if self.rates == "rewarm" and local < self.warmup else value

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Pass on to the run's schedule."""
        self.base.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """State of the run's schedule; the phase is restored by whoever began it."""
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the run's schedule."""
        self.base.load_state_dict(state)


def set_rates_(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to its own initial one times ``factor``, as the scheduler's next step would."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def reset_moments_(optimizer: Optimizer) -> None:
    """Let an optimizer begin its state anew: by its own ``reset_moments`` where it keeps more than moments there."""
    own = getattr(optimizer, "reset_moments", None)
    if own is None:
        optimizer.state.clear()
    else:
        own()
