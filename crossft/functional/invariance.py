"""Risks, gradients and gradient variances of domains, for generalization to unseen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.functional.precision import upcast

__all__ = ["gradient_variance", "logit_gradients", "scale_gradients", "square_of_mean", "update_group_weights"]


def logit_gradients(losses: Tensor, logits: Tensor) -> Tensor:
    """Gradient of each row's loss by its logits, [b, k], itself differentiable.

    Args:
        losses: [b], each row's from its own logits.
        logits: [b, k] of the same graph.
    """
    return torch.autograd.grad(losses.sum(), logits, create_graph=True)[0]


def scale_gradients(losses: Tensor, logits: Tensor) -> Tensor:
    """d loss_i(w z_i) / dw at w = 1 for each row, [b]: the inner product of z_i and d loss_i / d z_i.

    The mean over a domain's rows is its gradient by the dummy classifier of IRMv1 (Arjovsky et al. 2019, eq. IRMv1),
    for any task loss.

    Args:
        losses: [b].
        logits: [b, k] of the same graph.
    """
    return (upcast(logit_gradients(losses, logits)) * upcast(logits)).sum(1)


def square_of_mean(values: Tensor, unbiased: bool = True) -> Tensor:
    """Square of the expectation that ``values`` [n] are drawn around.

    ``unbiased``: (S^2 - sum v^2) / (n (n - 1)), the mean of v_i v_j over all i != j, which may be negative; the
    estimate from two disjoint halves is one such sum over fewer pairs. Else the square of the mean, too large by
    var / n. 0 with too few values.
    """
    n = len(values)
    if n < 1 + unbiased:
        return values.sum() * 0.0
    if unbiased:
        return (values.sum().square() - values.square().sum()) / (n * (n - 1))
    return values.mean().square()


def gradient_variance(gradients: Tensor, features: Tensor) -> Tensor:
    """Variance over rows of the gradient of a linear layer's weight and bias (Rame et al. 2022, Fishr, section 3).

    The gradient of row i is g_i h_i^T (weight) and g_i (bias), so the variance needs two matrix products and no
    per-row gradient tensors.

    Args:
        gradients: g [n, k], of each row's loss by the layer's output.
        features: h [n, d], the layer's input.

    Returns:
        [k * d + k]: the weight's variances, then the bias's; over n, as the published code.
    """
    n = len(gradients)
    weight = gradients.square().T @ features.square() / n - (gradients.T @ features / n).square()
    bias = gradients.square().mean(0) - gradients.mean(0).square()
    return torch.cat([weight.flatten(), bias])


def update_group_weights(weights: Tensor, losses: Tensor, eta: float) -> Tensor:
    """q_g exp(eta loss_g), normalized (Sagawa et al. 2020, algorithm 1).

    Args:
        weights: q [g], adding up to 1.
        losses: [g].
        eta: step size.
    """
    return torch.softmax(weights.clamp(min=1e-30).log() + eta * losses.detach(), 0)
