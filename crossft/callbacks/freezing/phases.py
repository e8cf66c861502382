"""Phases of a fit: what trains, for how long, and what becomes of learning rates, moments and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from crossft.callbacks.freezing.selection import Selection
from crossft.errors import ConfigError
from crossft.optim import Rates

__all__ = ["Phase", "check_plan", "planned_steps", "thawing"]

LENGTHS = ("epochs", "steps", "share", "patience")


@dataclass(frozen=True)
class Phase(Selection):
    """A span of training with one set of trainable parameters; the criteria are those of ``Selection``.

    Attributes:
        epochs: epochs it lasts, counted from the one it begins in.
        steps: or: optimizer steps it lasts.
        share: or: share of all optimizer steps it lasts.
        patience: or: it ends when the monitored metric has not improved in so many validations; on the last phase,
            training stops then.
        lr: factor on every learning rate during this phase.
        rates: at its beginning: ``keep`` lets the run's schedule go on; ``rewarm`` also warms up again over ``warmup``
            optimizer steps; ``restart`` begins the schedule anew, to end with the phase (a phase that ends on
            patience: with the run).
        warmup: optimizer steps of the new warmup.
        moments: at its beginning: ``keep`` or ``reset`` the optimizer's state (of all parameters).
        restore_best: at its end, go back to the weights of its best validation by the monitored metric.

    Raises:
        ConfigError: more than one length, or a value out of range.
    """

    epochs: int | None = None
    steps: int | None = None
    share: float | None = None
    patience: int | None = None
    lr: float = 1.0
    rates: Rates = "keep"
    warmup: int = 0
    moments: Literal["keep", "reset"] = "keep"
    restore_best: bool = False

    def __post_init__(self) -> None:
        if len(self.lengths) > 1:
            raise ConfigError(f"a phase has {' and '.join(self.lengths)}; give one of {', '.join(LENGTHS)}")
        for name in ("epochs", "steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"phase.{name}={value} must be at least 1")
        if self.share is not None and not 0.0 < self.share < 1.0:
            raise ConfigError(f"phase.share={self.share} must be in (0, 1): a share of all optimizer steps")
        if self.lr <= 0.0:
            raise ConfigError(f"phase.lr={self.lr} must be positive: a factor on the learning rates; 1 keeps them")
        if self.rates not in get_args(Rates):
            raise ConfigError(f"phase.rates={self.rates!r} is unknown; allowed: {', '.join(get_args(Rates))}")
        if (self.rates == "rewarm") != (self.warmup > 0):
            raise ConfigError(
                f"phase.rates={self.rates!r} with warmup={self.warmup}: rewarm needs warmup of at least 1 optimizer "
                "step, and only rewarm reads it"
            )
        if self.moments not in ("keep", "reset"):
            raise ConfigError(f"phase.moments={self.moments!r} is unknown; allowed: keep, reset")

    @property
    def lengths(self) -> list[str]:
        """Which of the lengths are given."""
        return [name for name in LENGTHS if getattr(self, name) is not None]


def thawing(every: Phase, stages: int, first: int, by: int) -> list[Phase]:
    """Phases that train the last ``first`` stages, then ``by`` more at a time, to the whole backbone.

    Args:
        every: length and policies of each phase; the last one keeps its policies, and its patience alone as length.
        stages: stages of the backbone.
        first: stages that train in the first phase.
        by: stages that thaw at each change.

    Raises:
        ConfigError: ``every`` chooses parameters itself, or a number is out of range.
    """
    if every.chooses:
        raise ConfigError("every: give length and policies only; what trains is set by first and by (or use phases)")
    if not 0 <= first < stages:
        raise ConfigError(f"first={first} must be between 0 and {stages - 1}: the backbone has {stages} stages")
    if by < 1:
        raise ConfigError(f"by={by} must be at least 1")
    depths = [*range(first, stages, by), stages]
    plan = [replace(every, train_last=depth) for depth in depths]
    plan[-1] = replace(plan[-1], epochs=None, steps=None, share=None, restore_best=False)
    return plan


def check_plan(plan: Sequence[Phase], monitor: str | None) -> None:
    """Check that phases make sense one after the other.

    Raises:
        ConfigError: fewer than two phases, one that never ends before the last, a last one with a fixed end, shares
            that leave nothing, or something to monitor without a metric.
    """
    if len(plan) < 2:
        raise ConfigError(f"phases: {len(plan)} given; there must be at least 2 (use Freeze for a single one)")
    for i, phase in enumerate(plan[:-1]):
        if not phase.lengths:
            raise ConfigError(f"phases[{i}] has no end; give one of {', '.join(LENGTHS)} (the last lasts to the end)")
    if set(plan[-1].lengths) - {"patience"}:
        raise ConfigError(
            f"the last phase has {plan[-1].lengths[0]}; it lasts until trainer.max_epochs or max_steps, or has patience"
        )
    if plan[-1].restore_best:
        raise ConfigError("the last phase has restore_best; set select to the metric instead, or checkpoints keep last")
    if sum(phase.share or 0.0 for phase in plan) >= 1.0:
        raise ConfigError("the phases' shares add up to 1 or more; the last phase needs some of the steps")
    if monitor is None and any(phase.patience or phase.restore_best for phase in plan):
        raise ConfigError("monitor: patience and restore_best need a validation metric, as target/val/accuracy")


def planned_steps(phase: Phase, start: int, total: int, steps_per_epoch: int) -> int:
    """Optimizer steps of a phase that begins at step ``start``, as far as they are known when it does.

    A phase that ends on patience, and the last, are taken to last until the end of the run.
    """
    rest = max(1, total - start)
    if phase.steps is not None:
        return min(phase.steps, rest)
    if phase.share is not None:
        return min(max(1, round(phase.share * total)), rest)
    if phase.epochs is not None:
        into = start % steps_per_epoch
        return min(phase.epochs * steps_per_epoch - into, rest)
    return rest
