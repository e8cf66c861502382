"""JAN: maximum mean discrepancy of the joint distribution of layers (Long et al. 2017)."""

from __future__ import annotations

import math
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

__all__ = ["JAN"]

Estimator = Literal["unbiased", "linear"]
SOFTMAX_SCALE = 1.68
"""2 sigma^2 of the kernel on probabilities in the code that Long et al. released."""


def _jmmd(
    first: list[Tensor],
    second: list[Tensor],
    bandwidths: tuple[float, ...],
    scales: tuple[float | None, ...],
    estimator: Estimator,
) -> Tensor:
    """Squared discrepancy under the product over layers of their kernels."""
    m = len(first[0])
    kernel = gaussian_kernel if estimator == "unbiased" else partial(paired_kernel, m=m)
    kernels = [
        kernel(torch.cat([x, y]), bandwidths=bandwidths if scale is None else (1.0,), scale=scale)
        for x, y, scale in zip(first, second, scales, strict=True)
    ]
    joint = math.prod(kernels[1:], start=kernels[0])
    return mmd_unbiased(joint, m) if estimator == "unbiased" else mmd_linear(joint)


class JAN(MethodCallback):
    """JAN (Long et al. 2017, Deep Transfer Learning with Joint Adaptation Networks, eq. 8 to 11).

    The squared maximum mean discrepancy under the product over layers of their kernels: a sum of Gaussians whose
    bandwidths are factors on the mean squared distance, and for probabilities one Gaussian with
    2 sigma^2 = 1.68, as in the released code. The estimate is the unbiased one as it stands; the released code adds
    a constant. Rows of all processes are compared; under gradient accumulation each micro-batch by itself. The
    adversarial variant JAN-A is not built.

    Args:
        weight: lambda (1 in the released code).
        layers: at least two of ``features``, ``logits``, ``probabilities`` and names of stages (the paper: pooled
            features and the softmax of the classifier).
        bandwidths: factors on the mean squared distance (1/4 to 4 in the released code).
        estimator: ``unbiased`` over all pairs of rows, or ``linear`` in time over disjoint ones (as in the paper).
        between: ``roles`` (all sources against all targets), ``pairs`` (each source domain against each target
            domain), or ``sources`` (every two sources; no target needed).

    Raises:
        ConfigError: an argument out of range.
        StageError: a layer that is none.
    """

    needs_source = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        layers: tuple[str, ...] = ("features", "probabilities"),
        bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
        estimator: Estimator = "unbiased",
        between: Between = "roles",
    ) -> None:
        super().__init__(weight)
        check_pairs(layers, between)
        if len(layers) < 2:
            raise ConfigError(
                f"layers={tuple(layers)}: a joint distribution needs two or more layers; for one, use MMD"
            )
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
        scales = tuple(SOFTMAX_SCALE if name == "probabilities" else None for name in self.layers)
        distance = partial(_jmmd, bandwidths=self.bandwidths, scales=scales, estimator=self.estimator)
        return pair_distance(task, self.name, self.layers, self.between, distance)
