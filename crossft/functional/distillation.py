"""Losses that hold a network's outputs near a teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from crossft.functional.precision import upcast
from crossft.types import Kind

__all__ = ["distillation", "feature_distance", "symmetric_kl"]


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0, kind: Kind = "multiclass") -> Tensor:
    """T^2 KL(teacher || student) of each row at temperature T, [b].

    Hinton et al. 2015, section 2, and Li & Hoiem 2016, eq. 2. The factor T^2 keeps the gradient's size independent of
    T. Against a cross-entropy it differs by the teacher's entropy, a constant, so that it is 0 where the two agree. For
    independent labels it is the mean over labels of the divergence of the two Bernoullis; for regression half the
    squared difference, and T counts for nothing.

    Args:
        student: [b, k] logits, or values [b, 1].
        teacher: the same shape; no gradient flows to it.
        temperature: T (2 in Li & Hoiem, section 3).
        kind: of the label space.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> distillation(z, z)
        tensor([0.])
    """
    s, t = upcast(student), upcast(teacher).detach()
    if kind == "regression":
        return 0.5 * (s - t).square().sum(1)
    s, t = s / temperature, t / temperature
    if kind == "multilabel":
        p = t.sigmoid()
        divergence = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        return temperature**2 * divergence.mean(1)
    log_s, log_t = s.log_softmax(1), t.log_softmax(1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)


def feature_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the mean squared difference over a row's features, [b] (Jung et al. 2016, eq. 2, with a mean for the sum).

    Args:
        student: [b, ...] any shape.
        teacher: the same; no gradient flows to it.
        mask: [b, n] for features [b, n, d]: positions that are real; the others count nowhere.
    """
    square = 0.5 * (upcast(student) - upcast(teacher).detach()).square()
    if mask is None:
        return square.flatten(1).mean(1)
    weights = mask.to(square)
    return (square.mean(2) * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def symmetric_kl(a: Tensor, b: Tensor, kind: Kind = "multiclass") -> Tensor:
    """KL(a || b) + KL(b || a) of each row's predictions, [b]; the squared difference for regression.

    Args:
        a: [b, k] logits, or values [b, 1].
        b: the same; gradients flow to both.
        kind: of the label space.
    """
    a, b = upcast(a), upcast(b)
    if kind == "regression":
        return (a - b).square().sum(1)
    if kind == "multilabel":  # (p - q)(logit p - logit q) is the sum of the two divergences of a Bernoulli
        return ((a.sigmoid() - b.sigmoid()) * (a - b)).mean(1)
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(1)
