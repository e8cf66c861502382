"""The training loader."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from crossft.data.dataset import Item

__all__ = ["TrainLoader", "make_loader"]


class TrainLoader(DataLoader[Item]):
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
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
