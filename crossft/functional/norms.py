"""Losses on the norms and singular values of features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spectral_penalty", "stepwise_norm"]


def spectral_penalty(features: Tensor, k: int = 1) -> Tensor:
    """Sum of the k largest squared singular values of a feature matrix (Chen et al. 2019, BSP; one domain's share).

    Args:
        features: [b, d].
        k: how many; all where the matrix has fewer.
    """
    found: Tensor = torch.linalg.svdvals(features)[:k].square().sum()
    return found


def stepwise_norm(features: Tensor, step: float = 1.0) -> Tensor:
    """(||f|| detached + step - ||f||)^2 of each row, [b] (Xu et al. 2019, SAFN, eq. 9).

    Its value is always step^2; its gradient lets every norm grow.

    Args:
        features: [b, d].
        step: Delta r.
    """
    norms = torch.linalg.vector_norm(features, dim=1)
    found: Tensor = (norms.detach() + step - norms).square()
    return found
