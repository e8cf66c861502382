"""What validation has seen of each domain: features, logits, and errors of labeled rows; joined over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from crossft.types import StepOutput

__all__ = ["Seen", "SeenRows"]


@dataclass(eq=False)
class Seen:
    """Rows of one domain in the order of their sample ids, which says nothing about their content.

    Attributes:
        features: [n, d] pooled.
        logits: [n, k] of the domain's head.
        losses: [n] task loss; NaN where a row has no label.
        labels: [n] class; -1 where a row has none, or the labels are no classes.
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    losses: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class of highest score of each row."""
        return np.asarray(self.logits.argmax(1), np.int64)

    def labeled(self) -> Seen:
        """The rows that have a label."""
        return self.take(np.flatnonzero(~np.isnan(self.losses)))

    def take(self, rows: NDArray[Any]) -> Seen:
        """Some rows."""
        return Seen(self.features[rows], self.logits[rows], self.losses[rows], self.labels[rows])


class SeenRows:
    """Collects the rows of evaluation batches by domain, on the CPU, until they are taken.

    A row without a label (an unlabeled domain's rows have none in validation) adds no label and no loss.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, ...]]] = {}

    def clear(self) -> None:
        """Forget all rows."""
        self._parts = {}

    def add(self, name: str, step: StepOutput, head: str) -> None:
        """Add the rows of one batch of domain ``name``; padding rows are left out."""
        batch = step.batch
        keep = batch.domains >= 0
        losses = torch.where(batch.labeled, step.per_sample_loss.float(), torch.nan)
        classes = batch.targets if batch.targets.ndim == 1 and not batch.targets.is_floating_point() else None
        labels = torch.full_like(batch.domains, -1) if classes is None else classes.masked_fill(~batch.labeled, -1)
        values = (batch.sample_ids, step.features.float(), step.logits[head].float(), losses, labels)
        self._parts.setdefault(name, []).append(tuple(v.detach()[keep].cpu() for v in values))

    def take(self, name: str, limit: int | None = None) -> Seen | None:
        """All processes' rows of a domain by sample id, at most the first ``limit``; None where there is none.

        Called by every process; each gets the same rows in the same order.
        """
        columns = [torch.cat(c).numpy() for c in zip(*self._parts.get(name, []))]
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, columns)
            columns = [np.concatenate(c) for c in zip(*(g for g in gathered if g and len(g[0])))]
        if not columns or not len(columns[0]):
            return None
        order = np.argsort(columns[0], kind="stable")[:limit]
        return Seen(*(c[order] for c in columns[1:]))
