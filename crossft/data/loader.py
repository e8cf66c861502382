"""Loaders of one process."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from crossft.data.collate import Collate
from crossft.data.dataset import Item, Rows
from crossft.data.sampler import EvalSampler, Key
from crossft.errors import ConfigError
from crossft.types import Batch, LateInputs

__all__ = ["Loader", "TrainLoader", "eval_loaders", "make_loader", "place"]


class Loader(DataLoader[Item]):
    """A loader whose batches load postponed inputs when somebody reads them."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of this process."""
        for batch in super().__iter__():
            if not batch.inputs:
                batch.inputs = LateInputs(partial(self._load, batch.keys), len(batch))
            yield batch

    def _load(self, keys: Sequence[Key], positions: Sequence[int]) -> dict[str, Tensor]:
        rows, collate = self.dataset, self.collate_fn
        assert isinstance(rows, Rows)
        assert isinstance(collate, Collate)
        return collate.inputs([rows.value(keys[i]) for i in positions])


class TrainLoader(Loader):
    """A loader that can be resumed: its order is computed from the trainer's step, so there is nothing to restore."""

    def state_dict(self) -> dict[str, Any]:
        """Empty; its presence tells Lightning that resuming within an epoch is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def make_loader(
    kind: type[DataLoader[Item]], dataset: Any, sampler: Any, collate: Any, workers: int
) -> DataLoader[Item]:
    """A loader with a generator of its own, so that it never draws from the global one."""
    return kind(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


def _leave_signals(worker: int) -> None:
    """Outlast the signals that a scheduler or Ctrl-C sends to every process of a run.

    A worker that dies of one would take the batch with it that the main process needs to reach its next step and save.
    A second SIGTERM ends it: the loader sends one to a worker that does not leave by itself.
    """
    signal.signal(signal.SIGTERM, _default_next_time)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _default_next_time(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)


def eval_loaders(
    dataset: Rows, parts: Sequence[tuple[int, NDArray[np.int64]]], batch_size: int, workers: int, rank: int, world: int
) -> list[DataLoader[Item]]:
    """One loader for each (domain id, dataset rows) that has rows."""
    collate = Collate(dataset.tokens)
    samplers = [EvalSampler(rows, number, batch_size, rank, world) for number, rows in parts if len(rows)]
    return [make_loader(Loader, dataset, sampler, collate, workers) for sampler in samplers]


def place(trainer: Any) -> tuple[int, int]:
    """Rank and world size of this process; 0 and 1 without a trainer.

    Raises:
        ConfigError: Lightning would divide the rows a second time.
    """
    if trainer is None:
        return 0, 1
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ConfigError(
            "trainer.use_distributed_sampler=true would replace the order of the data; set it to false (the data is "
            "divided over the processes already)"
        )
    return trainer.global_rank, trainer.world_size
