"""What a run gains and keeps: the primary metric of a kind of labels, retention, gain."""

from __future__ import annotations

import math
from typing import NamedTuple

from crossft.runs import higher_is_better
from crossft.types import Kind

__all__ = ["PrimaryMetric", "gain", "primary_metric", "retention"]


class PrimaryMetric(NamedTuple):
    """The metric that retention and gain are measured in, and its direction."""

    name: str
    higher_is_better: bool


_PRIMARY: dict[Kind, str] = {"multiclass": "accuracy", "multilabel": "average_precision", "regression": "mae"}


def primary_metric(kind: Kind) -> PrimaryMetric:
    """The primary metric of a kind of labels.

    - multiclass: ``accuracy``, the number that domain adaptation is reported in.
    - multilabel: ``average_precision`` (mean over labels, mAP): it needs no decision threshold, whereas F1 at 0.5
      measures the shift of the probabilities between domains as much as the ranking.
    - regression: ``mae``: always defined, in the target's own unit. Correlations are blind to a shift in mean and
      scale, which is what a change of domain often is, and undefined for a constant prediction.

    Example:
        >>> primary_metric("regression")
        PrimaryMetric(name='mae', higher_is_better=False)
    """
    name = _PRIMARY[kind]
    return PrimaryMetric(name, higher_is_better(name))


def retention(before: float | None, after: float | None, higher_is_better: bool = True) -> float | None:
    """Share of a metric that is kept: after / before, or before / after for an error.

    None where the ratio makes no sense: a value is missing; before is zero or less, or after is negative, as
    correlations and R2 can be; or an error is zero on either side. The difference (``gain``) always stands beside it.

    Example:
        >>> retention(0.8, 0.6)
        0.75
        >>> retention(2.0, 4.0, higher_is_better=False)
        0.5
    """
    if _missing(before) or _missing(after):
        return None
    assert before is not None
    assert after is not None
    if higher_is_better:
        return after / before if before > 0 and after >= 0 else None
    return before / after if before > 0 and after > 0 else None


def gain(before: float | None, after: float | None, higher_is_better: bool = True) -> float | None:
    """Improvement of a metric: after - before, and before - after for an error, so that more is always better.

    None where a value is missing.

    Example:
        >>> gain(0.5, 0.75)
        0.25
    """
    if _missing(before) or _missing(after):
        return None
    assert before is not None
    assert after is not None
    return after - before if higher_is_better else before - after


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
