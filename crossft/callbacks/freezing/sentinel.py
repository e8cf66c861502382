"""A sentinel that stops training when processes drift apart."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from crossft.callbacks.freezing.wrapping import check_ranks_equal
from crossft.errors import ConfigError

__all__ = ["RankSentinel"]


class RankSentinel(Callback):
    """Compare a hash of every parameter over the processes, and stop where they differ.

    Training that has drifted apart goes on without an error and ends with the first process's weights. The check
    reads the weights once and exchanges one number a parameter; it does nothing with one process. Phase changes
    compare as well, with or without this callback.

    Args:
        every_n_steps: optimizer steps between checks; the end of training is checked in any case.

    Raises:
        ConfigError: ``every_n_steps`` is below 1, or the strategy shards parameters.
        TrainingError: while training, on every process, where weights differ.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.name = "sentinel"

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"RankSentinel[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies in which processes are meant to hold different numbers."""
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigError(
                f"methods.{self.name} compares whole weights, which processes under "
                f"{type(trainer.strategy).__name__} need not hold; set it to null"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check after every n-th optimizer step."""
        done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 >= trainer.num_training_batches
        if done and trainer.global_step % self.every_n_steps == 0:
            check_ranks_equal(pl_module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the fit ends with."""
        check_ranks_equal(pl_module, trainer.global_step)
