"""Which strategies methods refuse that read or keep whole weights: those that cut a weight into pieces."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from crossft.errors import ConfigError

__all__ = ["refuse_sharded"]


def refuse_sharded(
    trainer: Trainer, name: str, reason: str = "keeps a whole copy of every weight", remedy: str = ""
) -> None:
    """Refuse strategies that shard weights: anchors and importance are whole tensors, a shard's gradient is not.

    Args:
        trainer: of the run.
        name: the method's.
        reason: what it does that slices do not allow.
        remedy: another way out than another strategy.

    Raises:
        ConfigError: the trainer shards.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"methods.{name} {reason}, and trainer.strategy ({type(trainer.strategy).__name__}) cuts the weights into "
            f"pieces; {remedy and f'{remedy}, or '}use trainer.strategy=ddp"
        )
