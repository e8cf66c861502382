"""Losses on the class predictions of unlabeled rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "batch_nuclear_norm",
    "classifier_discrepancy",
    "entropy",
    "log_not",
    "minimum_class_confusion",
]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row in nats, [b], from logits [b, k]."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


def minimum_class_confusion(logits: Tensor, temperature: float = 2.5) -> Tensor:
    """Minimum class confusion (Jin et al. 2020, eq. 1 to 7: the steps from predictions to the loss).

    Predictions at a temperature (probability rescaling), rows weighted by b (1 + exp(-H)) / sum (1 + exp(-H)) without
    gradient (uncertainty reweighting), class correlation P^T W P, each of its rows divided by its sum (category
    normalization), and the mean over classes of the off-diagonal sums.

    Args:
        logits: [b, k].
        temperature: T.
    """
    p = F.softmax(logits / temperature, 1)
    weights = 1.0 + torch.exp(-entropy(logits / temperature).detach())
    weights = weights * len(p) / weights.sum().clamp(min=1e-12)
    confusion = (p * weights[:, None]).T @ p
    confusion = confusion / confusion.sum(1, keepdim=True).clamp(min=1e-12)
    return (confusion.sum() - confusion.diagonal().sum()) / p.shape[1]


def batch_nuclear_norm(logits: Tensor) -> Tensor:
    """Nuclear norm of the prediction matrix over its rows, ||P||_* / b (Cui et al. 2020, section 3).

    Large where predictions are sure and classes many.

    Args:
        logits: [b, k].
    """
    found: Tensor = torch.linalg.svdvals(F.softmax(logits, 1)).sum() / max(1, len(logits))
    return found


def classifier_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Mean over classes of the absolute difference of two classifiers' predictions (Saito et al. 2018, eq. 1).

    Args:
        first, second: logits [b, k].

    Returns:
        [b].
    """
    return (F.softmax(first, 1) - F.softmax(second, 1)).abs().mean(1)


def log_not(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 - p_y) of each row, [b], without forming 1 - p_y: its gradient stays bounded as p_y goes to 1.

    Args:
        logits: [b, k], k >= 2.
        labels: [b] class y of each row.
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(own, float("-inf"))
    return torch.logsumexp(others, 1) - torch.logsumexp(logits, 1)
