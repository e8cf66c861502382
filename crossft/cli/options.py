"""The run's own settings, beside ``model``, ``data``, ``trainer`` and ``methods``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CheckpointOptions", "RunOptions", "SelectOptions", "WandbOptions"]


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
    """When checkpoints are saved, beside the end of every epoch.

    Attributes:
        every_minutes: minutes between saves within an epoch; null: never by time.
        every_n_steps: optimizer steps between saves within an epoch; null: never by count.
        keep: number of step checkpoints kept for a resume.
    """

    every_minutes: float | None = 10.0
    every_n_steps: int | None = None
    keep: int = 2


@dataclass
class SelectOptions:
    """Which checkpoint the run is measured with. ``--select METRIC`` is short for ``--select.metric METRIC``.

    Attributes:
        metric: validation metric that chooses it: one whose labels the run has (source/val/accuracy), or a score of the
            target without labels (target/val/infomax; entropy, snd, bnm, dev, iwcv, reverse); null: the last one.
        oracle: report under ``oracle/`` what a choice by the target's test labels would have given, and the regret.
            It predicts the target's test rows at each validation; labels are read when the choice is made.
    """

    metric: str | None = None
    oracle: bool = False


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
