"""The primary metric of a kind of labels, in which retention and gain are measured."""

from __future__ import annotations

from typing import NamedTuple

from crossft.runs import gain, higher_is_better, retention
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
