"""Gaussian kernels and the maximum mean discrepancies built on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossft.functional.precision import upcast

__all__ = ["BANDWIDTHS", "gaussian_kernel", "mmd_linear", "mmd_unbiased", "squared_distances"]

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors on the mean squared distance: the five kernels of the code that Long et al. released for DAN and JAN."""


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows, never negative.

    Sums are taken in float64 where the device has it: |a|^2 + |b|^2 - 2ab loses what is left of close rows.

    Args:
        x: [n, d].

    Returns:
        [n, n], in float32 at least.
    """
    x = upcast(x)
    wide = x if x.device.type == "mps" else x.double()
    square = wide.square().sum(1)
    return (square[:, None] + square[None, :] - 2 * wide @ wide.T).clamp(min=0).to(x.dtype)


def gaussian_kernel(x: Tensor, bandwidths: Sequence[float] = BANDWIDTHS, scale: float | None = None) -> Tensor:
    """Sum of Gaussian kernels exp(-||a - b||^2 / (u * scale)) over the factors u (Long et al. 2015, section 3).

    The scale is the mean squared distance between different rows of ``x``, without gradient, or
    given (2 sigma^2).

    Args:
        x: [n, d], all rows that are compared, of both domains.
        bandwidths: the factors u.
        scale: a fixed value instead of the mean squared distance.

    Returns:
        [n, n].
    """
    distances = squared_distances(x)
    n = len(x)
    if scale is None:
        mean = distances.detach().sum() / max(1, n * (n - 1))
        width = torch.where(mean > 0, mean, torch.ones_like(mean))
    else:
        width = distances.new_tensor(scale)
    return torch.stack([torch.exp(-distances / (u * width)) for u in bandwidths]).sum(0)


def mmd_unbiased(kernel: Tensor, m: int) -> Tensor:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, A Kernel Two-Sample Test, eq. 3).

    1/(m(m-1)) sum_{i != j} k(x_i, x_j) + 1/(n(n-1)) sum_{i != j} k(y_i, y_j) - 2/(mn) sum_{i,j} k(x_i, y_j).
    It may be negative. 0 where one side has fewer than two rows.

    Args:
        kernel: [m + n, m + n], the rows x first.
        m: rows of x.
    """
    n = len(kernel) - m
    if min(m, n) < 2:
        return kernel.sum() * 0.0
    xx, yy, xy = kernel[:m, :m], kernel[m:, m:], kernel[:m, m:]
    within = (xx.sum() - xx.diagonal().sum()) / (m * (m - 1)) + (yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * xy.mean()


def mmd_linear(kernel: Tensor, m: int) -> Tensor:
    """Linear-time squared maximum mean discrepancy (Gretton et al. 2012, lemma 14).

    The mean over i of k(x_2i-1, x_2i) + k(y_2i-1, y_2i) - k(x_2i-1, y_2i) - k(x_2i, y_2i-1), over as many pairs as
    both sides have. Unbiased, with more variance than the estimate over all pairs. 0 where a side has one row.

    Args:
        kernel: [m + n, m + n], the rows x first.
        m: rows of x.
    """
    pairs = min(m, len(kernel) - m) // 2
    if pairs == 0:
        return kernel.sum() * 0.0
    first = torch.arange(0, 2 * pairs, 2, device=kernel.device)
    second = first + 1
    h = kernel[first, second] + kernel[m + first, m + second] - kernel[first, m + second] - kernel[second, m + first]
    return h.mean()
