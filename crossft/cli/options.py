"""The run's own settings, beside ``model``, ``data``, ``trainer`` and ``methods``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["CheckpointOptions", "RunOptions", "SelectOptions", "TrialOptions", "WandbOptions", "WatchOptions"]


@dataclass
class RunOptions:
    """Where the run folder lies, and what is done of it.

    Attributes:
        root: folder of all experiments; a run's folder is ``ROOT/EXPERIMENT/ARM-sSEED-HASH``.
        dir: or: the run's folder itself.
        resume: continue the same run where its folder holds it unfinished, and leave a finished one as it is; null:
            only where SLURM or torchrun starts the same command again.
        only_source: fit the source that the run would start from, and stop.
    """

    root: str = "runs"
    dir: str | None = None
    resume: bool | None = None
    only_source: bool = False


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
class TrialOptions:
    """The trial of a search that this run belongs to; ``crossft sweep run`` sets it.

    Attributes:
        metric: what the search reads; a validation metric is checked to be there before training starts.
        storage: the search's file, where this run reports to it after every validation.
        study: the trial's study.
        number: the trial's number in it.
        early_terminate: how the search ends trials early.
    """

    metric: str | None = None
    storage: str | None = None
    study: str | None = None
    number: int | None = None
    early_terminate: dict[str, Any] | None = None


@dataclass
class WatchOptions:
    """What is measured while training, beside validation: drift of weights and features, sources on a few rows.

    Attributes:
        rows: source rows, over all sources; 0: none.
        every_n_steps: optimizer steps between measurements within an epoch; null: at epoch ends only.
    """

    rows: int = 64
    every_n_steps: int | None = None


@dataclass
class WandbOptions:
    """The W&B run of this run.

    Attributes:
        mode: ``auto`` is online where a key is configured (WANDB_API_KEY or ~/.netrc), offline otherwise.
        project: default: ``crossft``.
        entity: the W&B user or team; default: that of the key.
        group: runs shown together; default: the experiment.
        checkpoints: ``reference`` notes the path and the hash of the last and the best checkpoint, and sends no file;
            ``upload`` stores the files; ``none`` leaves them out.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    checkpoints: Literal["reference", "upload", "none"] = "reference"
