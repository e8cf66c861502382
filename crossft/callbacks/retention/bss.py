"""BSS: batch spectral shrinkage against negative transfer (Chen et al. 2019)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rows import ids_of, refuse_absent
from crossft.errors import ConfigError
from crossft.functional.gather import gather_rows
from crossft.functional.precision import upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["BSS", "SpectralShrinkage"]


class SpectralShrinkage(LossTerm):
    """Sum of the k smallest squared singular values of the batch's feature matrix.

    Args:
        ids: domain ids of the rows.
        k: how many.
    """

    def __init__(self, ids: tuple[int, ...], k: int) -> None:
        super().__init__()
        self.ids, self.k = ids, k

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """A scalar; 0 where the batch has none of these rows."""
        (rows,) = gather_rows(upcast(step.features)[step.rows(self.ids)])
        if len(rows) == 0:
            return step.features.sum() * 0.0
        found: Tensor = torch.linalg.svdvals(rows)[-self.k :].square().sum()
        return found


class BSS(MethodCallback):
    """Batch spectral shrinkage (Chen et al. 2019, Catastrophic Forgetting Meets Negative Transfer, eq. 5).

    The k smallest singular values of a batch's feature matrix [b, d] shrink: pretrained directions that the target
    does not use fade, instead of hurting it. A statistic of the batch of all processes together: exact under DDP, of
    each micro-batch under accumulation. Needs no source data; the paper adds it to L2-SP or DELTA.

    Args:
        weight: eta (0.001 in the paper, section 5).
        k: number of singular values (1 in the paper).

    Raises:
        ConfigError: ``k`` below 1.
    """

    def __init__(self, weight: float = 1e-3, k: int = 1) -> None:
        super().__init__(weight)
        if k < 1:
            raise ConfigError(f"k={k} must be at least 1: the number of smallest singular values that shrink")
        self.k = k

    def build(self, task: Task) -> LossTerm:
        """Shrink the features of target rows."""
        return SpectralShrinkage(ids_of(task, "target"), self.k)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without rows to work on."""
        assert isinstance(pl_module, Task)
        refuse_absent(trainer, self.name, ids_of(pl_module, "target"))
