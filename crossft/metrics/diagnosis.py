"""How much of a loss is due to which of two causes, from the four models that have each of them, both, or neither."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Split", "remedy", "split_forgetting"]

_LITTLE, _PART = 0.01, 0.25


class Split(NamedTuple):
    """What was forgotten, in the metric's unit and so that more is more forgotten; the two add up to all of it.

    Attributes:
        statistics: the part of BatchNorm's running statistics.
        weights: the part of everything else.
    """

    statistics: float
    weights: float

    @property
    def total(self) -> float:
        """All that was forgotten: before - after."""
        return self.statistics + self.weights


def split_forgetting(
    before: float, after: float, start_statistics: float, new_statistics: float, higher_is_better: bool = True
) -> Split:
    """Split before - after into the part of the statistics and the part of the weights: their Shapley values.

    Each cause counts with the mean of what it takes away when it comes first and when it comes second (Shapley 1953),
    so the two add up, and a cause that changes nothing in either order has no part.

    Args:
        before: metric of the starting model, with its own weights and statistics.
        after: of the fine-tuned one.
        start_statistics: of the new weights with the start's statistics put back.
        new_statistics: of the start's weights with the new statistics put in.
        higher_is_better: of the metric.

    Example:
        >>> split_forgetting(before=0.8, after=0.2, start_statistics=0.6, new_statistics=0.4)
        Split(statistics=0.4, weights=0.2)
    """
    sign = 1.0 if higher_is_better else -1.0
    statistics = 0.5 * ((before - new_statistics) + (start_statistics - after))
    weights = 0.5 * ((before - start_statistics) + (new_statistics - after))
    return Split(round(sign * statistics, 12), round(sign * weights, 12))


def remedy(split: Split, before: float, start_statistics: float, own_statistics: float | None) -> str:
    """Which remedy fits.

    ``none``: at most 1 % of the metric was forgotten. ``weights``: less than a quarter of it by the statistics.
    ``frozen``: the statistics are at fault and those of the start still fit. ``per_domain``: they are, and statistics
    of the source computed under the new weights fit better than the start's. ``frozen+weights`` and
    ``per_domain+weights``: the weights have more than a quarter as well.

    Args:
        split: from ``split_forgetting``.
        before: metric of the starting model.
        start_statistics: of the new weights with the start's statistics.
        own_statistics: of the new weights with statistics computed on the source, oriented as ``start_statistics``
            (more is better); None where there is no such model.
    """
    if split.total <= _LITTLE * abs(before):
        return "none"
    share = split.statistics / split.total
    if share < _PART:
        return "weights"
    better = own_statistics is not None and own_statistics > start_statistics + _LITTLE * abs(before)
    choice = "per_domain" if better else "frozen"
    return choice if share > 1.0 - _PART else f"{choice}+weights"
