"""Transfer over a sequence of domains, from the matrix of accuracies. Each docstring names the variant it computes.

``R`` [t, t]: row i holds the test accuracy on every domain after learning domain i, both in learning order. None (or
NaN) stands where it was not measured: above the diagonal, where nothing has trained the domain's own head yet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossft.errors import ConfigError

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "learning_accuracy"]


def _matrix(R: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ConfigError(
            f"R has shape {matrix.shape}; it must be square [t, t]: one row after each learned domain, one column a "
            "domain, both in learning order"
        )
    return matrix


def average_accuracy(R: ArrayLike) -> float:
    """ACC: mean of the last row (Lopez-Paz & Ranzato 2017, eq. 2).

    Args:
        R: [t, t] accuracies.

    Raises:
        ConfigError: ``R`` is not square.
    """
    return float(_matrix(R)[-1].mean())


def backward_transfer(R: ArrayLike) -> float | None:
    """BWT: mean over i < t of R[t, i] - R[i, i] (Lopez-Paz & Ranzato 2017, eq. 3): last row against the diagonal.

    Not the variant of Diaz-Rodriguez et al. 2018, which averages over the whole lower triangle. None for one domain.

    Args:
        R: [t, t] accuracies.

    Raises:
        ConfigError: ``R`` is not square.
    """
    matrix = _matrix(R)
    if len(matrix) < 2:
        return None
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def forward_transfer(R: ArrayLike, baseline: ArrayLike) -> float | None:
    """FWT: mean over i > 1 of R[i-1, i] - baseline[i] (Lopez-Paz & Ranzato 2017, eq. 4).

    None for one domain, and where a value above the diagonal was not measured.

    Args:
        R: [t, t] accuracies.
        baseline: [t] accuracy of the untrained model on each domain (the paper's b, at random initialization). For
            fine-tuning it is that of the pretrained starting model, which makes another number of it: say which.

    Raises:
        ConfigError: ``R`` is not square, or ``baseline`` has another length.
    """
    matrix, start = _matrix(R), np.array(baseline, dtype=np.float64)
    if start.shape != (len(matrix),):
        raise ConfigError(f"baseline has shape {start.shape}; give one accuracy for each of the {len(matrix)} domains")
    if len(matrix) < 2:
        return None
    mean = float((matrix.diagonal(1) - start[1:]).mean())
    return None if np.isnan(mean) else mean


def forgetting(R: ArrayLike) -> float | None:
    """Average forgetting after the last domain (Chaudhry et al. 2018, eq. 3, averaged over the earlier domains).

    For each j < t: the best of R[l, j] over l < t (all rows but the last, also those before j was learned), minus
    R[t, j]. Negative where the last row is the best. Libraries that include the last row in the maximum cannot go
    below zero. What was not measured counts nowhere. None for one domain.

    Args:
        R: [t, t] accuracies.

    Raises:
        ConfigError: ``R`` is not square.
    """
    matrix = _matrix(R)
    if len(matrix) < 2:
        return None
    return float((np.fmax.reduce(matrix[:-1]) - matrix[-1])[:-1].mean())


def learning_accuracy(R: ArrayLike) -> float:
    """LA: mean of the diagonal, the accuracy on each domain right after learning it (as named by Riemer et al. 2019).

    Args:
        R: [t, t] accuracies.

    Raises:
        ConfigError: ``R`` is not square.
    """
    return float(_matrix(R).diagonal().mean())
