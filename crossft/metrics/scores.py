"""The scores themselves, as pure functions of counts or of predictions. NaN wherever a score is undefined.

Why not torchmetrics' own functions: version 1.9 averages an AUROC of 0 for a class that is absent from a split, counts
an absent class that was predicted once as recall 0, takes a regression target of small scale (variance below 1e-4) for
constant, and sums R2 in float32. Where both are defined the numbers equal scikit-learn's (``tests/metrics``).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "calibration_error",
    "macro_f1",
    "mae",
    "mse",
    "multilabel_accuracy",
    "multilabel_balanced_accuracy",
    "multilabel_macro_f1",
    "pearson",
    "r2",
    "spearman",
    "tie_counts",
]


def _nanmean(values: Tensor, defined: Tensor) -> Tensor:
    """Mean of ``values`` [k] where ``defined``; NaN where nothing is."""
    return values[defined].mean()


def accuracy(confusion: Tensor) -> Tensor:
    """Share of rows that are right. ``confusion`` [k, k] counts, row = truth, column = prediction."""
    return confusion.diagonal().sum() / confusion.sum()


def balanced_accuracy(confusion: Tensor) -> Tensor:
    """Mean recall over the classes that occur. ``confusion`` [k, k] as in ``accuracy``."""
    support = confusion.sum(1)
    return _nanmean(confusion.diagonal() / support, support > 0)


def macro_f1(confusion: Tensor) -> Tensor:
    """Mean F1 over the classes that occur or are predicted. ``confusion`` [k, k] as in ``accuracy``."""
    both = confusion.sum(0) + confusion.sum(1)
    return _nanmean(2 * confusion.diagonal() / both, both > 0)


def multilabel_accuracy(confusion: Tensor) -> Tensor:
    """Share of label decisions that are right, all labels together. ``confusion`` [k, 2, 2], [truth, prediction]."""
    return (confusion[:, 0, 0] + confusion[:, 1, 1]).sum() / confusion.sum()


def multilabel_balanced_accuracy(confusion: Tensor) -> Tensor:
    """Mean over labels of (recall + specificity) / 2; labels with one truth value only are left out. [k, 2, 2]."""
    support = confusion.sum(2)
    recalls = confusion.diagonal(dim1=1, dim2=2) / support
    return _nanmean(recalls.mean(1), (support > 0).all(1))


def multilabel_macro_f1(confusion: Tensor) -> Tensor:
    """Mean F1 over the labels that occur or are predicted. ``confusion`` [k, 2, 2], [truth, prediction]."""
    both = confusion[:, 1].sum(1) + confusion[:, :, 1].sum(1)
    return _nanmean(2 * confusion[:, 1, 1] / both, both > 0)


def tie_counts(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Count positives and negatives at each distinct score, lowest score first.

    Args:
        scores: [n] float.
        positive: [n] bool.

    Returns:
        positives [g] and negatives [g], int64.
    """
    values, group = torch.unique(scores, return_inverse=True)
    positives = torch.bincount(group[positive], minlength=len(values))
    return positives, torch.bincount(group[~positive], minlength=len(values))


def auroc(positives: Tensor, negatives: Tensor) -> Tensor:
    """Area under the ROC curve, a tie counting half (Mann-Whitney U over the number of pairs).

    Args:
        positives: [..., g] int64, counts at each score, lowest score first; ``negatives`` the same.

    Returns:
        [...]; NaN without a positive or without a negative.
    """
    below = negatives.cumsum(-1) - negatives
    twice = (positives * (2 * below + negatives)).sum(-1)
    return twice / (2 * positives.sum(-1) * negatives.sum(-1))


def average_precision(positives: Tensor, negatives: Tensor) -> Tensor:
    """Average precision, sum over scores of (recall step) x precision, without interpolation.

    Args:
        positives: [..., g] int64, counts at each score, lowest score first; ``negatives`` the same.

    Returns:
        [...]; NaN without a positive.
    """
    hits = positives.flip(-1)
    taken = (positives + negatives).flip(-1).cumsum(-1)
    precision = hits.cumsum(-1) / taken.clamp(min=1)
    return (hits * precision).sum(-1) / positives.sum(-1)


def calibration_error(bins: Tensor) -> Tensor:
    """Expected calibration error: the l1 gap of confidence and outcome over equal-width bins (Guo et al. 2017, eq. 3).

    Args:
        bins: [3, n_bins]: rows, sum of confidences, and sum of outcomes in each bin.
    """
    count, confidence, outcome = bins
    found: Tensor = (confidence - outcome).abs().sum() / count.sum()
    return found


def _wide(values: Tensor) -> Tensor:
    return values if values.device.type == "mps" else values.double()


def mse(preds: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of ``preds`` [n] and ``targets`` [n]."""
    return (_wide(preds) - _wide(targets)).square().mean()


def mae(preds: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of ``preds`` [n] and ``targets`` [n]."""
    return (_wide(preds) - _wide(targets)).abs().mean()


def _constant(values: Tensor) -> bool:
    return len(values) < 2 or bool(values.min() == values.max())


def r2(preds: Tensor, targets: Tensor) -> Tensor:
    """Coefficient of determination, [n] and [n]; NaN where the targets are constant."""
    preds, targets = _wide(preds), _wide(targets)
    if _constant(targets):
        return targets.new_tensor(float("nan"))
    return 1 - (targets - preds).square().sum() / (targets - targets.mean()).square().sum()


def pearson(preds: Tensor, targets: Tensor) -> Tensor:
    """Pearson's correlation, [n] and [n]; NaN where either is constant."""
    preds, targets = _wide(preds), _wide(targets)
    if _constant(preds) or _constant(targets):
        return targets.new_tensor(float("nan"))
    x, y = preds - preds.mean(), targets - targets.mean()
    found: Tensor = ((x / x.norm()) @ (y / y.norm())).clamp(-1, 1)
    return found


def spearman(preds: Tensor, targets: Tensor) -> Tensor:
    """Spearman's rank correlation, [n] and [n], ties given their mean rank; NaN where either is constant."""
    if preds.isnan().any():
        return targets.new_tensor(float("nan"))
    return pearson(_twice_ranks(preds), _twice_ranks(targets))


def _twice_ranks(values: Tensor) -> Tensor:
    _, group, count = torch.unique(values, return_inverse=True, return_counts=True)
    found: Tensor = (2 * count.cumsum(0) - count)[group].to(
        values.dtype if values.device.type == "mps" else torch.float64
    )
    return found
