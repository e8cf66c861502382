"""Conditioning features on predictions (Long et al. 2018, Conditional Adversarial Domain Adaptation)."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["multilinear", "randomized_multilinear"]


def multilinear(features: Tensor, predictions: Tensor) -> Tensor:
    """Outer product f (x) g of each row, flattened (Long et al. 2018, section 3.1).

    Args:
        features: [b, d].
        predictions: [b, k] probabilities.

    Returns:
        [b, d * k].
    """
    return (predictions.unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def randomized_multilinear(features: Tensor, predictions: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """1/sqrt(r) (R_f f) * (R_g g), an unbiased estimate of products of outer products (section 3.1).

    Args:
        features: [b, d].
        predictions: [b, k] probabilities.
        first: R_f [d, r], entries of mean 0 and variance 1.
        second: R_g [k, r], the same.

    Returns:
        [b, r].
    """
    return (features @ first) * (predictions @ second) / math.sqrt(first.shape[1])
