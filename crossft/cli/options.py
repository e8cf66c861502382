"""The run's own settings, beside ``model``, ``data``, ``trainer`` and ``methods``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crossft.errors import ConfigError

__all__ = ["CheckpointOptions", "RunOptions", "WandbOptions"]


@dataclass
class RunOptions:
    """Where the run folder lies.

    Attributes:
        root: folder of all experiments; a run's folder is ``ROOT/EXPERIMENT/ARM-sSEED-HASH``.
        dir: or: the run's folder itself.
    """

    root: str = "runs"
    dir: str | None = None


@dataclass
class CheckpointOptions:
    """When checkpoints are saved.

    Attributes:
        every_n_steps: optimizer steps between saves within an epoch; null saves at the end of each epoch only.
        keep: number of step checkpoints kept for a resume.
    """

    every_n_steps: int | None = 100
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ConfigError(f"checkpoints.every_n_steps={self.every_n_steps} must be at least 1, or null")
        if self.keep < 1:
            raise ConfigError(f"checkpoints.keep={self.keep} must be at least 1: a resume needs a checkpoint")


@dataclass
class WandbOptions:
    """The W&B run of this run.

    Attributes:
        mode: ``auto`` is online where a key is configured (WANDB_API_KEY or ~/.netrc), offline otherwise.
        project: default: the experiment's name.
        entity: the W&B user or team; default: that of the key.
        group: runs shown together; default: the arm.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
