"""The run's own log: every logged metric as a line of ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from crossft.runs import MetricsCsv, RunFolder

__all__ = ["RunLog"]


class RunLog(Logger):
    """A Lightning logger that appends to ``metrics.csv`` of a run folder, on the first process only.

    Args:
        folder: the run folder.
        start_step: optimizer step the fit starts at; after a resume, rows from there on are dropped and written again.
    """

    def __init__(self, folder: Path | str, start_step: int = 0) -> None:
        super().__init__()
        self.folder = RunFolder(folder)
        self._csv = MetricsCsv(self.folder.metrics)
        self._start_step = start_step
        self._started = False

    @property
    def name(self) -> str:
        """Name of the experiment: the parent folder."""
        return self.folder.path.parent.name

    @property
    def version(self) -> str:
        """Id of the run: the folder's name."""
        return self.folder.path.name

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the metrics of one optimizer step (counted from 0)."""
        if not self._started:
            self._csv.truncate(self._start_step - 1)
            self._started = True
        values = dict(metrics)
        epoch = int(values.pop("epoch", 0))
        self._csv.append(int(step or 0), epoch, values)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        self._csv.close()
