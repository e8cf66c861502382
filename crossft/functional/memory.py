"""Which rows to remember: reservoir, class-balanced, herding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["balanced", "herding", "reservoir", "shares"]

Rows = NDArray[np.int64]


def reservoir(count: int, size: int, seed: int = 0) -> Rows:
    """Positions of a uniform sample of ``size`` out of ``count`` rows, seen one by one (Vitter 1985, algorithm R).

    Args:
        count: rows in the stream.
        size: rows kept; all where there are fewer.
        seed: of the draws.

    Returns:
        Positions, ascending.
    """
    rng = np.random.default_rng(seed)
    kept = list(range(min(count, size)))
    for i in range(len(kept), count):
        j = int(rng.integers(i + 1))
        if j < size:
            kept[j] = i
    return np.sort(np.array(kept, np.int64))


def shares(labels: NDArray[np.int64], size: int) -> dict[int, int]:
    """Rows kept of each class: as equal as the classes' sizes allow, ``size`` in all where there are so many.

    A class that has too few gives its room to the others.
    """
    have = {int(c): int((labels == c).sum()) for c in np.unique(labels)}
    kept = dict.fromkeys(have, 0)
    left = min(size, len(labels))
    while left:
        for c in sorted(have, key=lambda c: kept[c]):
            if left and kept[c] < have[c] and kept[c] == min(kept[o] for o in have if kept[o] < have[o]):
                kept[c] += 1
                left -= 1
    return kept


def balanced(labels: NDArray[np.int64], size: int, seed: int = 0) -> Rows:
    """Positions of a random sample with as equal numbers of each class as there are.

    Args:
        labels: [n] class of each row.
        size: rows kept in all.
        seed: of the draws.

    Returns:
        Positions, ascending.
    """
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in shares(labels, size).items()]
    return np.sort(np.concatenate(parts).astype(np.int64))


def herding(features: NDArray[np.floating], labels: NDArray[np.int64], size: int) -> Rows:
    """Positions of the rows whose running mean stays nearest their class's mean (Rebuffi et al. 2017, algorithm 4).

    Features are scaled to unit length first, as there. Each class is chosen greedily, so a smaller memory is the
    beginning of a larger one. Equal distances go to the earlier row.

    Args:
        features: [n, d].
        labels: [n] class of each row.
        size: rows kept in all, as equal as possible over classes.

    Returns:
        Positions, ascending.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    chosen: list[int] = []
    for c, k in shares(labels, size).items():
        own = np.flatnonzero(labels == c)
        x = unit[own].astype(np.float64)
        mean, total, free = x.mean(0), np.zeros(x.shape[1]), np.ones(len(own), bool)
        for i in range(1, k + 1):
            distance = np.linalg.norm(mean - (total + x) / i, axis=1)
            best = int(np.argmin(np.where(free, distance, np.inf)))
            free[best] = False
            total += x[best]
            chosen.append(int(own[best]))
    return np.sort(np.array(chosen, np.int64))
