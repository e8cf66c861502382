"""How alike two representations of the same rows are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_cka"]


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centered kernel alignment (Kornblith et al. 2019, section 3, linear case), a scalar in [0, 1].

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of features centered over rows: 1 for features that differ by a rotation,
    a shift and one factor. NaN where one side is the same for every row.

    Args:
        x: [n, d] features.
        y: [n, e] features of the same rows.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> round(float(linear_cka(x, 5 * x.flip(1) + 1)), 4)
        1.0
    """
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    gram_x, gram_y = x @ x.T, y @ y.T  # [n, n]: the same norms as of [d, d], and smaller for few rows
    found: Tensor = (gram_x * gram_y).sum() / (torch.linalg.matrix_norm(gram_x) * torch.linalg.matrix_norm(gram_y))
    return found
