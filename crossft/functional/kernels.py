"""Gaussian kernels and the maximum mean discrepancies built on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossft.functional.precision import upcast

__all__ = ["BANDWIDTHS", "gaussian_kernel", "mmd_linear", "mmd_unbiased", "paired_kernel", "squared_distances"]

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
    """Sum of Gaussian kernels exp(-||a - b||^2 / (u * scale)) over the factors u (Long et al. 2015, eq. 2).

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
    mean = distances.detach().sum() / max(1, n * (n - 1)) if scale is None else None
    return _gaussians(distances, bandwidths, scale, mean)


def paired_kernel(x: Tensor, m: int, bandwidths: Sequence[float] = BANDWIDTHS, scale: float | None = None) -> Tensor:
    """What `mmd_linear` needs of `gaussian_kernel`, in time linear in the rows.

    Args:
        x: [m + n, d], the rows of the one domain first.
        m: how many these are.
        bandwidths: the factors u.
        scale: a fixed value instead of the mean squared distance.

    Returns:
        [4, min(m, n) // 2]: k(x_2i-1, x_2i), k(y_2i-1, y_2i), k(x_2i-1, y_2i) and k(x_2i, y_2i-1).
    """
    x = upcast(x)
    rows, pairs = len(x), min(m, len(x) - m) // 2
    wide = x.detach() if x.device.type == "mps" else x.detach().double()
    total = 2 * (rows * wide.square().sum() - wide.sum(0).square().sum())  # of the squared distances between all rows
    mean = (total / max(1, rows * (rows - 1))).to(x.dtype) if scale is None else None
    a, b = x[: 2 * pairs : 2], x[1 : 2 * pairs : 2]
    c, d = x[m : m + 2 * pairs : 2], x[m + 1 : m + 2 * pairs : 2]
    distances = torch.stack([(one - other).square().sum(1) for one, other in ((a, b), (c, d), (a, d), (b, c))])
    return _gaussians(distances, bandwidths, scale, mean)


def _gaussians(distances: Tensor, bandwidths: Sequence[float], scale: float | None, mean: Tensor | None) -> Tensor:
    width = distances.new_tensor(scale) if mean is None else torch.where(mean > 0, mean, torch.ones_like(mean))
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


def mmd_linear(kernel: Tensor) -> Tensor:
    """Linear-time squared maximum mean discrepancy (Gretton et al. 2012, lemma 14).

    The mean over i of k(x_2i-1, x_2i) + k(y_2i-1, y_2i) - k(x_2i-1, y_2i) - k(x_2i, y_2i-1), over as many pairs as
    both sides have. Unbiased, with more variance than the estimate over all pairs. 0 where a side has one row.

    Args:
        kernel: [4, pairs] of `paired_kernel`.
    """
    if kernel.shape[1] == 0:
        return kernel.sum() * 0.0
    return (kernel[0] + kernel[1] - kernel[2] - kernel[3]).mean()
