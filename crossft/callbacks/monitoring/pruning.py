"""Pruning: a trial that a search has given up ends at a validation, on all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.errors import ConfigError, Pruned

__all__ = ["Pruning"]


class Pruning(Callback):
    """Reports a validation metric, and ends the fit where the search says that the trial is not worth going on.

    The first process alone reports and asks; its answer reaches all processes before any of them takes another step.
    The number of validations is in the checkpoint, so that a resumed run counts on.

    Args:
        metric: key of the metric, as validation logs it.
        worse: takes the number of the validation, from 1, and the metric; whether the trial is to end.

    Raises:
        Pruned: in every process, at the end of a validation.
        ConfigError: validation does not measure the metric.
    """

    def __init__(self, metric: str, worse: Callable[[int, float], bool]) -> None:
        self.metric, self.worse = metric, worse
        self.validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and end the fit or go on."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            known = sorted(key for key in trainer.callback_metrics if "/val/" in key)
            raise ConfigError(f"trial.metric={self.metric!r} was not measured; validation gives {', '.join(known)}")
        self.validations += 1
        value = float(trainer.callback_metrics[self.metric])
        wanted = trainer.is_global_zero and self.worse(self.validations, value)
        if trainer.strategy.reduce_boolean_decision(wanted, all=False):
            raise Pruned(
                f"ended early by the search at optimizer step {trainer.global_step}, after validation "
                f"{self.validations}: {self.metric} = {value:.4f}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of validations."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.validations = int(state_dict["validations"])
