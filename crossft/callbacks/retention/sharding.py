"""Which strategies the methods of this axis refuse: those that cut a weight into pieces."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from crossft.errors import ConfigError

__all__ = ["refuse_sharded"]


def refuse_sharded(trainer: Trainer, name: str) -> None:
    """Refuse strategies that shard weights: anchors and importance are whole tensors, a shard's gradient is not.

    Raises:
        ConfigError: the trainer shards.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"methods.{name} keeps a whole copy of every weight, and trainer.strategy "
            f"({type(trainer.strategy).__name__}) cuts the weights into pieces; use trainer.strategy=ddp"
        )
