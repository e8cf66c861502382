"""Metrics: a collection a domain, retention and gain, and transfer over a sequence of domains.

Pure functions are in ``scores``, the stateful shells that add up over batches and processes in ``states``.
"""

from crossft.metrics.domain import confusion, domain_metrics
from crossft.metrics.retention import PrimaryMetric, gain, primary_metric, retention
from crossft.metrics.transfer import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

__all__ = [
    "PrimaryMetric",
    "average_accuracy",
    "backward_transfer",
    "confusion",
    "domain_metrics",
    "forgetting",
    "forward_transfer",
    "gain",
    "learning_accuracy",
    "primary_metric",
    "retention",
]
