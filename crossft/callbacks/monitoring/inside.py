"""What the model makes of some validation rows of each domain: features of several stages, and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.adaptation.features import Layer
from crossft.callbacks.monitoring.seen import Seen
from crossft.callbacks.retention.rehearsal import seen_by
from crossft.data.prepare import first_rows
from crossft.tasks import Task
from crossft.types import Batch, Domain, StepOutput

__all__ = ["Inside", "look_inside"]


@dataclass(eq=False)
class Inside:
    """Rows of one domain, in the order of their sample ids.

    Attributes:
        domain: theirs.
        seen: pooled features and logits; labels and losses of a source alone.
        layers: [n, d] pooled values by layer name.
    """

    domain: Domain
    seen: Seen
    layers: dict[str, NDArray[np.float32]]

    @property
    def marginal(self) -> NDArray[np.float64]:
        """[k] share of the rows that are predicted as each class."""
        return np.bincount(self.seen.predicted, minlength=self.seen.logits.shape[1]) / len(self.seen)

    @property
    def marginal_entropy(self) -> float:
        """Entropy of the shares of the predicted classes over log k.

        Of classes, not of probabilities: where features shrink, every prediction is unsure and the mean probability is
        even, while one class is largest everywhere.
        """
        m = self.marginal
        return float(-(m * np.log(m.clip(1e-300))).sum() / np.log(max(2, len(m))))

    @property
    def largest_class(self) -> float:
        """Share of the rows of the class that is predicted most."""
        return float(self.marginal.max())

    @property
    def spread(self) -> float:
        """Root mean square distance of the features from their mean."""
        return float(np.sqrt(self.seen.features.var(0).sum()))

    def class_names(self) -> list[str]:
        """Name of each row's class: as labeled where the domain is a labeled source, else as predicted."""
        known = self.seen.labels >= 0
        return [self.domain.labels[i] for i in np.where(known, self.seen.labels, self.seen.predicted)]

    @staticmethod
    def labeled_rows(parts: Sequence[Inside]) -> Seen | None:
        """The labeled rows of several domains, one after the other; None where there is none."""
        found = [p.seen.take(np.flatnonzero(p.seen.labels >= 0)) for p in parts]
        found = [seen for seen in found if len(seen)]
        if not found:
            return None
        columns = zip(*((s.features, s.logits, s.losses, s.labels) for s in found))
        return Seen(*(np.concatenate(c) for c in columns))


def look_inside(task: Task, data: Any, layers: Sequence[Layer], limit: int) -> dict[str, Inside]:
    """One pass over the first validation rows, by sample id, of every source and target; no label of a target is read.

    Called by every process; each gets the same.

    Args:
        task: left as it is.
        data: bound.
        layers: what to read beside features and logits.
        limit: most rows of a domain.
    """
    found: dict[str, Inside] = {}
    for number, (prepared, start) in enumerate(zip(data.prepared, first_rows(data.prepared))):
        domain, rows = prepared.domain, prepared.rows("val")[:limit]
        if domain.role == "eval" or not len(rows):
            continue
        head = task.head_keys[domain.name]
        widths: list[int] = []
        values = seen_by(task, data, {number: start + rows}, partial(_read, task, head, layers, widths)).numpy()
        if not widths:  # a process that had no row of its own
            raise AssertionError("evaluation hands every process a row")
        features, logits, *others = np.split(values, np.cumsum(widths)[:-1], axis=1)
        labels = np.full(len(rows), -1, np.int64)
        if domain.role == "source":
            labels = np.where(prepared.labeled[rows], prepared.targets[rows], -1).astype(np.int64)
        seen = Seen(features, logits, np.full(len(rows), np.nan, np.float32), labels)
        found[domain.name] = Inside(domain, seen, {layer.name: x for layer, x in zip(layers, others)})
    return found


def _read(task: Task, head: str, layers: Sequence[Layer], widths: list[int], batch: Batch) -> Tensor:
    """Everything of a row side by side, [b, sum of widths]; ``widths`` is filled in."""
    if task.batchnorm == "per_domain":
        set_domains(task.backbone, batch.domains)
    encoded = task.encode(batch, tuple(name for layer in layers for name in layer.stage))
    parts = [encoded.features, task.heads[head](encoded.features)]
    parts += [layer.rows(cast(StepOutput, encoded)) for layer in layers]
    widths[:] = [p.shape[1] for p in parts]
    return torch.cat([p.float() for p in parts], 1)
