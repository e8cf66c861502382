"""Distances between the moments of two batches of features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["central_moment_discrepancy", "coral"]


def _covariance(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    return centered.T @ centered / (len(x) - 1)


def coral(x: Tensor, y: Tensor) -> Tensor:
    """CORAL loss: squared distance of the covariances (Sun & Saenko 2016, Deep CORAL, eq. 1 to 3).

    1/(4 d^2) ||C_x - C_y||_F^2 with covariances over n - 1. 0 where a side has fewer than two rows.

    Args:
        x: [m, d].
        y: [n, d].
    """
    if min(len(x), len(y)) < 2:
        return x.sum() * 0.0 + y.sum() * 0.0
    difference = _covariance(x) - _covariance(y)
    return difference.square().sum() / (4 * x.shape[1] ** 2)


def central_moment_discrepancy(x: Tensor, y: Tensor, moments: int = 5, width: float = 1.0) -> Tensor:
    """Central moment discrepancy (Zellinger et al. 2017, definition 2).

    1/|b-a| ||E x - E y||_2 + sum_{k=2..K} 1/|b-a|^k ||C_k(x) - C_k(y)||_2, C_k the central moments of each
    coordinate. 0 where a side is empty.

    Args:
        x: [m, d], values in [a, b].
        y: [n, d], values in [a, b].
        moments: K.
        width: b - a.
    """
    if min(len(x), len(y)) < 1:
        return x.sum() * 0.0 + y.sum() * 0.0
    mean_x, mean_y = x.mean(0), y.mean(0)
    distance: Tensor = torch.linalg.vector_norm(mean_x - mean_y) / width
    for k in range(2, moments + 1):
        difference = (x - mean_x).pow(k).mean(0) - (y - mean_y).pow(k).mean(0)
        distance = distance + torch.linalg.vector_norm(difference) / width**k
    return distance
