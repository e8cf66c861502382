"""A schedule that lowers the learning rate when a validation metric stops getting better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from crossft.errors import ConfigError
from crossft.optim.schedules import WarmedUp

__all__ = ["Plateau"]


class Plateau(WarmedUp):
    """Linear warmup to 1; then the learning rate is multiplied by ``factor`` each time the metric stands still.

    The rule is that of torch's ``ReduceLROnPlateau``, run on a learning rate of 1, and its state is in the
    checkpoint. A drop takes effect at the second optimizer step after the validation that caused it. A phase with
    ``rates: restart`` begins it anew, with no drop, no best value and no count; later phases go on from there.

    Args:
        monitor: the validation metric, as it is logged (``target/val/loss``).
        mode: ``min`` where less is better, else ``max``.
        factor: what the learning rate is multiplied by (0.1: torch's default).
        patience: validations without improvement that are let pass (10: torch's default).
        threshold: relative change that counts as an improvement (1e-4: torch's default).
        lowest: the factor never falls below this.
        warmup: share of all optimizer steps (below 1) or number of them.

    Raises:
        ConfigError: a setting out of range; while training, a validation that does not measure ``monitor``.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        lowest: float = 0.0,
        warmup: float = 0.0,
    ) -> None:
        super().__init__(warmup, lowest)
        if not 0.0 < factor < 1.0:
            raise ConfigError(f"factor={factor} must be in (0, 1): it lowers the learning rate")
        if patience < 0:
            raise ConfigError(f"patience={patience} must be >= 0: validations without improvement")
        self.monitor = monitor
        self._settings: dict[str, Any] = {
            "mode": mode, "factor": factor, "patience": patience, "threshold": threshold, "min_lr": lowest,
        }  # fmt: skip
        self.restart()

    def restart(self) -> None:
        """Forget the drops, the best value and the count."""
        self._rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._rule = ReduceLROnPlateau(self._rate, **self._settings)

    def __call__(self, step: int, total: int) -> float:
        """Factor on the learning rate at optimizer step ``step``, by the validations seen so far."""
        warmup = self.warmup_steps(total)
        return self.decay(0.0) * ((step + 1) / (warmup + 1) if step < warmup else 1.0)

    def decay(self, share: float) -> float:
        """Product of the drops so far."""
        return float(self._rate.param_groups[0]["lr"])

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Count one validation."""
        if self.monitor not in metrics:
            known = ", ".join(sorted(k for k in metrics if "/val/" in k)) or "nothing"
            raise ConfigError(f"schedule.monitor={self.monitor!r} was not measured; validation gives {known}")
        self._rule.step(float(metrics[self.monitor]))

    def state_dict(self) -> dict[str, Any]:
        """State of torch's rule, and the factor."""
        return {"rule": self._rule.state_dict(), "factor": self.decay(0.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state:
            self._rule.load_state_dict(state["rule"])
            self._rate.param_groups[0]["lr"] = state["factor"]
