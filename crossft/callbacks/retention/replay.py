"""Experience replay: source rows in every batch (Chaudhry et al. 2019)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from crossft.callbacks.retention.rehearsal import Keep, Rehearsing, check_memory, chosen_rows
from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["Replay"]


class Replay(Rehearsing):
    """Experience replay (Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning, algorithm 1).

    A memory of source rows is chosen before training, and a share of every batch is drawn from it; their labels train
    like any other. An epoch stays a pass over the mix, so switching this on changes the number of target rows in a step
    (``data.batch_size`` counts all rows), not which of them make an epoch. In the paper memory and new rows have half
    of the batch each. Needs labeled source rows: as many as ``size``.

    Args:
        size: rows kept, over all source domains; null keeps all.
        share: of each micro-batch.
        keep: which rows are kept.

    Raises:
        ConfigError: a setting out of range, no labeled source row, or a batch too small.
    """

    reads_source = "few"

    def __init__(self, size: int | None = 200, share: float = 0.5, keep: Keep = "balanced") -> None:
        super().__init__()
        check_memory(size, keep)
        if not 0.0 < share < 1.0:
            raise ConfigError(f"share={share} must be between 0 and 1: the part of each batch that is rehearsed")
        self.size, self.share, self.keep, self.name = size, share, keep, "replay"

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"Replay[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the memory: before the loader is made, at the weights the leg starts from."""
        if stage != "fit":
            return
        assert isinstance(pl_module, Task)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.remember(data, chosen_rows(pl_module, data, self.name, self.size, self.keep), self.share)
