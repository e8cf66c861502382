"""Freezing by depth or by stage name, once, for the whole run."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["Freeze"]


class Freeze(Callback):
    """Train only some stages of the backbone; the head always trains.

    A frozen stage has no gradient, keeps its buffers, and stays in evaluation mode while training.

    Args:
        train_last: train the last k stages; 0 is a linear probe.
        train: or: names of the stages that train.

    Raises:
        ConfigError: neither or both are given, or ``train_last`` is negative or more than the backbone has.
    """

    def __init__(self, train_last: int | None = None, train: list[str] | None = None) -> None:
        if (train_last is None) == (train is None):
            raise ConfigError(f"train_last={train_last}, train={train}: give exactly one of them")
        self.train_last, self.train = train_last, train
        self.name = "freeze"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before DDP wraps, so that the reducer sees exactly what trains."""
        if stage != "fit" or not isinstance(pl_module, Task):
            return
        names = [s.name for s in pl_module.backbone.stages]
        if self.train is not None:
            pl_module.train_stages(self.train)
            return
        last = self.train_last or 0
        if not 0 <= last <= len(names):
            raise ConfigError(f"train_last={last} must be between 0 and {len(names)}, the number of stages")
        pl_module.train_stages(names[len(names) - last :])

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Freeze[{self.name}]"
