"""The course of a fit, as far as it is known before it: its steps, its validations, and where phases can begin."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from crossft.callbacks.freezing.phases import Phase, planned_steps
from crossft.errors import ConfigError

__all__ = ["Course", "check_lengths", "check_reach", "course_of", "earliest_starts"]


@dataclass(frozen=True)
class Course:
    """What decides where phases begin.

    Attributes:
        total: optimizer steps of the fit.
        batches: micro-batches of an epoch.
        accumulation: micro-batches of an optimizer step.
        val_batches: micro-batches between validations; None: one at an epoch's end, 0: never.
        val_epochs: epochs between those that validate; None: ``val_batches`` are counted over epochs.
    """

    total: int
    batches: int
    accumulation: int = 1
    val_batches: int | None = None
    val_epochs: int | None = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.batches / self.accumulation)

    def validations(self, step: int) -> int:
        """Validations that lie before the beginning of optimizer step ``step``."""
        every = self.batches if self.val_batches is None else self.val_batches
        if every == 0:
            return 0
        epoch, within = divmod(step, self.steps_per_epoch)
        into = within * self.accumulation
        if self.val_epochs is None:
            return (epoch * self.batches + into) // every
        now = into // every if (epoch + 1) % self.val_epochs == 0 else 0
        return epoch // self.val_epochs * (self.batches // every) + now


def course_of(trainer: Trainer) -> Course | None:
    """The course of a fit that starts; None where its length is not known, or a dry run ends it.

    Validations by the clock are taken to come after every micro-batch.

    Args:
        trainer: with its loaders made, as in ``on_train_start``.
    """
    total, batches, every = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.val_check_batch
    short: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
    if short or math.isinf(total) or math.isinf(batches):
        return None
    if every is None:  # validations by the clock
        every = 1
    loaded = trainer.val_dataloaders is None or any(trainer.num_val_batches)  # None: not looked at yet
    val_batches = None if math.isinf(every) else int(every)
    validates = trainer.enable_validation and loaded
    return Course(
        int(total),
        int(batches),
        trainer.accumulate_grad_batches,
        val_batches if validates else 0,
        trainer.check_val_every_n_epoch,
    )


def earliest_starts(plan: Sequence[Phase], course: Course) -> list[int]:
    """First optimizer step of each phase that the fit can enter, in order.

    A phase that ends on patience is taken to end as soon as it can: its first validation is its best.
    """
    starts = [0]
    for phase in plan[:-1]:
        start = starts[-1]
        if phase.patience is not None:
            needed = course.validations(start) + phase.patience + 1
            steps = range(start + 1, course.total)
            following = start + 1 + bisect_left(steps, needed, key=course.validations)
        else:
            following = start + planned_steps(phase, start, course.total, course.steps_per_epoch)
        if following >= course.total:
            break
        starts.append(following)
    return starts


def check_lengths(plan: Sequence[Phase], max_epochs: int | None, max_steps: int | None, name: str) -> None:
    """Check that the last phase can be entered, from settings alone: where all phases are counted as the fit is.

    Args:
        plan: the phases.
        max_epochs: of the fit; None or -1: no such limit.
        max_steps: of the fit, likewise.
        name: of the method, for the message.

    Raises:
        ConfigError: the phases before the last are as long as the fit.
    """
    for unit, most in (("epochs", max_epochs), ("steps", max_steps)):
        lengths = [getattr(phase, unit) or 0 for phase in plan[:-1]]
        if most is not None and all(lengths) and 0 < most <= sum(lengths):
            raise ConfigError(
                f"methods.{name}: the last of {len(plan)} phases is never entered: those before it take "
                f"{sum(lengths):g} {unit}, and trainer.max_{unit}={most}; raise that, make phases shorter, or thaw "
                "more at a time (by)"
            )


def check_reach(plan: Sequence[Phase], course: Course, name: str) -> list[int]:
    """Check that the last phase can be entered, and return ``earliest_starts``.

    Args:
        plan: the phases.
        course: of the fit.
        name: of the method, for the message.

    Raises:
        ConfigError: even where every phase ends as early as it can, the fit is over before the last begins.
    """
    starts = earliest_starts(plan, course)
    if len(starts) == len(plan):
        return starts
    validations = ""
    if any(phase.patience for phase in plan[:-1]):
        needed = sum(phase.patience + 1 for phase in plan[:-1] if phase.patience)
        validations = (
            f" and {course.validations(course.total - 1)} validations before its last step, of which phases that end "
            f"on patience take {needed} (patience + 1 each) where every one stands still; validate more often "
            "(trainer.val_check_interval, trainer.check_val_every_n_epoch), lower patience,"
        )
    raise ConfigError(
        f"methods.{name}: the last of {len(plan)} phases is never entered: phase {len(starts) - 1} (counted from 0) "
        f"begins at optimizer step {starts[-1]} at the earliest and lasts to the end. The run has {course.total} "
        f"optimizer steps in epochs of {course.steps_per_epoch}{validations or ';'} raise trainer.max_epochs or "
        "max_steps, make phases shorter, or thaw more at a time (by)"
    )
