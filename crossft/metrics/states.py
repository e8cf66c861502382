"""What the metrics add up over batches and processes: four torchmetrics shells around the functions of ``scores``.

Metrics with one kind of state share it inside a ``MetricCollection``. States are not part of a ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from crossft.errors import ConfigError, LabelError
from crossft.metrics.scores import tie_counts
from crossft.types import Domain

__all__ = ["Calibration", "Confusion", "Ranking", "Regression"]


def _check(preds: Tensor, targets: Tensor, domain: Domain) -> None:
    """Refuse shapes and labels outside the domain's label space.

    Raises:
        LabelError: naming the domain, and what was expected.
    """
    k = len(domain.labels)
    wanted = (len(preds),) if domain.kind == "multiclass" else (len(preds), k)
    if preds.ndim != 2 or preds.shape[1] != k or targets.shape != wanted:
        raise LabelError(
            f"metrics of domain {domain.name!r} ({domain.kind}, {k} labels) want probabilities [b, {k}] and targets "
            f"{'[b]' if domain.kind == 'multiclass' else f'[b, {k}]'}; got {[*preds.shape]} and {[*targets.shape]}"
        )
    top = k - 1 if domain.kind == "multiclass" else 1
    if targets.numel() and (targets.min() < 0 or targets.max() > top):
        raise LabelError(
            f"a target of domain {domain.name!r} lies outside 0..{top}; mask unlabeled and padding rows before update"
        )


class Confusion(Metric):
    """The confusion matrix of a domain, or a score computed from it.

    Args:
        domain: multiclass, or multilabel with the decision at probability 0.5.
        score: a function of the matrix; None returns the matrix itself: [k, k] int64 with the truth in rows
            (multiclass), or [k, 2, 2] (multilabel).

    Raises:
        LabelError: in ``update``, for shapes or targets outside the label space.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, domain: Domain, score: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        k = len(domain.labels)
        self.domain, self.score = domain, score
        shape = (k, k) if domain.kind == "multiclass" else (k, 2, 2)
        self.add_state("table", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities [b, k], and targets [b] (multiclass) or [b, k] (multilabel)."""
        _check(preds, targets, self.domain)
        targets = targets.long()
        if self.domain.kind == "multiclass":
            cell = targets * preds.shape[1] + preds.argmax(1)
        else:
            label = torch.arange(preds.shape[1], device=preds.device)
            cell = (label * 4 + targets * 2 + (preds > 0.5).long()).flatten()
        self.table += torch.bincount(cell, minlength=self.table.numel()).view_as(self.table)

    def compute(self) -> Tensor:
        """The score, a scalar; or the matrix."""
        return self.table.clone() if self.score is None else self.score(self.table)


class _Lists(Metric):
    """Predictions and targets of all rows, as lists that are joined over processes.

    A process that saw no row still takes part with an empty tensor of the right shape and type: torchmetrics would
    gather tensors of different ranks then.
    """

    full_state_update = False
    preds: list[Tensor]
    targets: list[Tensor]

    def __init__(self, width: int | None, target_width: int | None, target_type: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty_preds = (0,) if width is None else (0, width)
        self._empty_targets = (0,) if target_width is None else (0, target_width)
        self._target_type = target_type
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def _add(self, preds: Tensor, targets: Tensor) -> None:
        self.preds.append(preds.detach().float())
        self.targets.append(targets.detach().to(self._target_type))

    def _fill(self) -> None:
        if isinstance(self.preds, list) and not self.preds:
            empty = torch.zeros(self._empty_preds, device=self.device)
            self._add(empty, torch.zeros(self._empty_targets, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Join the lists of all processes; see ``torchmetrics.Metric.sync``."""
        self._fill()
        super().sync(*args, **kwargs)

    def _joined(self) -> tuple[Tensor, Tensor]:
        self._fill()
        return dim_zero_cat(self.preds), dim_zero_cat(self.targets)


class Ranking(_Lists):
    """A score of how well each label's probability ranks the rows: the mean over the labels where it is defined.

    Args:
        domain: multiclass (one label against the rest) or multilabel.
        score: a function of positives and negatives [..., g] per distinct probability, such as ``scores.auroc``.
        bins: None keeps every probability and is exact; a number keeps counts over that many equal bins instead, in
            constant memory: [k, 2, bins]. Probabilities of one bin then count as equal.

    Raises:
        ConfigError: ``bins`` is below 2.
        LabelError: in ``update``, for shapes or targets outside the label space.
    """

    counts: Tensor

    def __init__(
        self, domain: Domain, score: Callable[[Tensor, Tensor], Tensor], bins: int | None = None, **kwargs: Any
    ) -> None:
        k = len(domain.labels)
        multilabel = domain.kind == "multilabel"
        super().__init__(k, k if multilabel else None, torch.uint8 if multilabel else torch.int64, **kwargs)
        if bins is not None and bins < 2:
            raise ConfigError(f"thresholds={bins} is below 2; give at least 2 bins, or None for exact scores")
        self.domain, self.score, self.bins = domain, score, bins
        if bins is not None:
            self.add_state("counts", torch.zeros(k, 2, bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities [b, k], and targets [b] (multiclass) or [b, k] (multilabel)."""
        _check(preds, targets, self.domain)
        if self.bins is None:
            self._add(preds, targets)
            return
        label = torch.arange(preds.shape[1], device=preds.device)
        place = (preds.float() * self.bins).long().clamp(0, self.bins - 1)
        cell = (label * 2 + self._positive(targets).long()) * self.bins + place
        self.counts += torch.bincount(cell.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _positive(self, targets: Tensor) -> Tensor:
        if self.domain.kind == "multilabel":
            return targets > 0
        return targets[:, None] == torch.arange(len(self.domain.labels), device=targets.device)

    def compute(self) -> Tensor:
        """The score, a scalar; NaN where no label has one, or a probability is NaN."""
        if self.bins is not None:
            each = self.score(self.counts[:, 1], self.counts[:, 0])
        else:
            preds, targets = self._joined()
            if preds.isnan().any():
                return preds.new_tensor(float("nan"))
            positive = self._positive(targets)
            pairs = (tie_counts(p, y) for p, y in zip(preds.T.contiguous(), positive.T))
            each = torch.stack([self.score(*pair) for pair in pairs])
        return each[~each.isnan()].mean()


class Calibration(Metric):
    """A score of how far probabilities are from frequencies, over equal-width bins of the confidence.

    Args:
        domain: multiclass (confidence: the highest probability; outcome: whether that label is right) or multilabel
            (every label decision: confidence is the label's probability, outcome its truth).
        score: a function of the bins [3, n_bins], such as ``scores.calibration_error``.
        n_bins: 15, as Guo et al. 2017.

    Raises:
        LabelError: in ``update``, for shapes or targets outside the label space.
    """

    full_state_update = False
    bins: Tensor

    def __init__(self, domain: Domain, score: Callable[[Tensor], Tensor], n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.domain, self.score, self.n_bins = domain, score, n_bins
        self.add_state("bins", torch.zeros(3, n_bins), dist_reduce_fx="sum")

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities [b, k], and targets [b] (multiclass) or [b, k] (multilabel)."""
        _check(preds, targets, self.domain)
        preds = preds.detach().float()
        if self.domain.kind == "multiclass":
            confidence, label = preds.max(1)
            outcome = (label == targets).float()
        else:
            confidence, outcome = preds.flatten(), targets.flatten().float()
        place = (confidence * self.n_bins).ceil().long().clamp(1, self.n_bins) - 1  # (0, 1/n], (1/n, 2/n], ...
        member = torch.nn.functional.one_hot(place, self.n_bins).float()
        self.bins += torch.stack([torch.ones_like(confidence), confidence, outcome]) @ member

    def compute(self) -> Tensor:
        """The score, a scalar."""
        return self.score(self.bins)


class Regression(_Lists):
    """A score of predictions [n] against targets [n], kept whole, so that means are exact and ranks possible.

    Args:
        domain: of kind regression; named in errors.
        score: a function of predictions and targets, such as ``scores.mae``.

    Raises:
        LabelError: in ``update``, for other shapes than [b] and [b], or a target that is NaN.
    """

    def __init__(self, domain: Domain, score: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(None, None, torch.float32, **kwargs)
        self.domain, self.score = domain, score

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Add a batch: predictions [b] and targets [b]."""
        if preds.ndim != 1 or preds.shape != targets.shape:
            raise LabelError(
                f"metrics of domain {self.domain.name!r} (regression) want predictions [b] and targets [b]; "
                f"got {[*preds.shape]} and {[*targets.shape]}"
            )
        if targets.isnan().any():
            raise LabelError(
                f"a target of domain {self.domain.name!r} is NaN; mask unlabeled and padding rows before update"
            )
        self._add(preds, targets)

    def compute(self) -> Tensor:
        """The score, a scalar."""
        return self.score(*self._joined()).float()
