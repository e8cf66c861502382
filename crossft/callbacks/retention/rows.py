"""Which rows the terms of this axis read, and that some are there."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Trainer

from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["Which", "ids_of", "refuse_absent"]

Which = Literal["target", "all"]


def ids_of(task: Task, which: Which) -> tuple[int, ...]:
    """Ids of the target domains, or of all.

    Raises:
        ConfigError: ``which`` is neither.
    """
    if which not in ("target", "all"):
        raise ConfigError(f"rows={which!r} is unknown; allowed: target, all")
    return tuple(i for i, d in enumerate(task.domains) if which == "all" or d.role == "target")


def refuse_absent(trainer: Trainer, name: str, ids: tuple[int, ...]) -> None:
    """Refuse a fit whose batches never hold a row of these domains: the method would do nothing, and say nothing.

    Called when every method has asked for its rows.

    Raises:
        ConfigError: no row of these domains is in the mix.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not {pool.domain for pool in data.pools()} & set(ids):
        raise ConfigError(
            f"methods.{name} works on target rows, and no training batch holds one; add target to data.train_on, "
            "or switch the method off"
        )
