"""DAN: maximum mean discrepancy under several kernels (Long et al. 2015)."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from crossft.callbacks.adaptation.pairs import check_pairs, pair_distance
from crossft.callbacks.adaptation.roles import Between
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import gaussian_kernel, mmd_linear, mmd_unbiased, paired_kernel
from crossft.tasks import Task
from crossft.types import LossTerm

__all__ = ["MMD"]

Estimator = Literal["unbiased", "linear"]


def _mmd(first: list[Tensor], second: list[Tensor], bandwidths: tuple[float, ...], estimator: Estimator) -> Tensor:
    """Sum over layers of the squared discrepancy."""
    m, rows = len(first[0]), [torch.cat([x, y]) for x, y in zip(first, second, strict=True)]
    if estimator == "linear":
        return torch.stack([mmd_linear(paired_kernel(z, m, bandwidths)) for z in rows]).sum()
    return torch.stack([mmd_unbiased(gaussian_kernel(z, bandwidths), m) for z in rows]).sum()


class MMD(MethodCallback):
    """DAN (Long et al. 2015, Learning Transferable Features with Deep Adaptation Networks, eq. 1 and 4).

    The squared maximum mean discrepancy under a sum of Gaussian kernels, summed over layers. The bandwidths are
    factors on the mean squared distance of the batch, without gradient, and all kernels count the same, as in the
    released code; the paper learns their weights by a quadratic program. The released code adds a constant to the
    estimate to keep it positive; here it is the unbiased estimate as it stands, which may be negative.

    Rows of all processes are compared, so the result does not depend on the number of processes; under gradient
    accumulation each micro-batch is compared by itself.

    Args:
        weight: lambda (1 in the released code).
        layers: ``features``, ``logits``, ``probabilities`` or names of stages (the paper: the last layers that are
            specific to the task).
        bandwidths: factors on the mean squared distance (1/4 to 4 in the released code).
        estimator: ``unbiased`` over all pairs of rows, or ``linear`` in time over disjoint ones (as in the paper).
        between: ``roles`` (all sources against all targets), ``pairs`` (each source domain against each target
            domain), or ``sources`` (every two sources; no target needed, as in DomainBed's MMD).

    Raises:
        ConfigError: an argument out of range.
        StageError: a layer that is none.
    """

    needs_source = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        layers: tuple[str, ...] = ("features",),
        bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
        estimator: Estimator = "unbiased",
        between: Between = "roles",
    ) -> None:
        super().__init__(weight)
        check_pairs(layers, between)
        if not bandwidths or min(bandwidths) <= 0:
            raise ConfigError(f"bandwidths={tuple(bandwidths)} must be one or more positive factors")
        if estimator not in get_args(Estimator):
            raise ConfigError(f"estimator={estimator!r} is unknown; allowed: {', '.join(get_args(Estimator))}")
        self.layers, self.bandwidths, self.estimator, self.between = (
            tuple(layers),
            tuple(bandwidths),
            estimator,
            between,
        )
        self.needs_target = "none" if between == "sources" else "unlabeled"

    def build(self, task: Task) -> LossTerm:
        """Resolve pairs and layers."""
        distance = partial(_mmd, bandwidths=self.bandwidths, estimator=self.estimator)
        return pair_distance(task, self.name, self.layers, self.between, distance)
