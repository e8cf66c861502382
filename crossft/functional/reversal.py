"""Gradient reversal (Ganin et al. 2016, Domain-Adversarial Training of Neural Networks, section 4.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["adversarial_strength", "reverse_gradient"]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * -ctx.strength, None


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
    found: Tensor = _Reverse.apply(x, strength)
    return found


def adversarial_strength(progress: float, gamma: float = 10.0) -> float:
    """lambda_p = 2 / (1 + exp(-gamma p)) - 1 over total progress p in [0, 1] (Ganin et al. 2016, section 5.2.2).

    0 at the start, 0.9866 at p = 1/2 and 0.99991 at the end for the published gamma = 10.
    """
    return 2.0 / (1.0 + math.exp(-gamma * progress)) - 1.0
