"""Whether the cached path gives what the full path gives."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from crossft.backbones.batchnorm import set_domains, without_statistics
from crossft.types import Batch, Encoded, LateInputs

__all__ = ["VERIFIED", "aside", "differs", "some", "tolerance"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference between cached and full path, relative to the largest feature, by the coarsest type in it."""
VERIFIED = 4
"""Rows of the first batch that run both ways."""


def tolerance(device: torch.device, storage: str) -> float:
    """The largest difference allowed where values are stored as ``storage``, under the present autocast."""
    coarse = torch.is_autocast_enabled(device.type) or storage == "bfloat16"
    return TOLERANCE["bfloat16" if coarse else "float32"]


@contextmanager
def aside(backbone: nn.Module, domains: Tensor) -> Iterator[None]:
    """Run without a gradient, and leave random generators and BatchNorm statistics as they are.

    Args:
        backbone: what runs.
        domains: [b] domain ids of the batch that comes after it.
    """
    devices = [domains.device] if domains.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices), without_statistics([backbone]):
        try:
            yield
        finally:
            set_domains(backbone, domains)


def some(batch: Batch, count: int) -> Batch:
    """A batch of at most ``count`` rows, spread over the batch; texts keep its padding."""
    rows = torch.linspace(0, len(batch) - 1, min(count, len(batch))).round().long().tolist()
    inputs = batch.inputs
    return replace(
        batch,
        inputs=inputs.take(rows) if isinstance(inputs, LateInputs) else {k: v[rows] for k, v in inputs.items()},
        targets=batch.targets[rows],
        labeled=batch.labeled[rows],
        domains=batch.domains[rows],
        sample_ids=batch.sample_ids[rows],
        keys=tuple(batch.keys[i] for i in rows),
    )


def differs(full: Encoded, mine: Encoded, batch: Batch, capture: Collection[str], tolerance: float) -> str | None:
    """Say how ``mine`` differs from ``full`` in features or captured stages, or None.

    Args:
        full: of the full path.
        mine: of the cached path.
        batch: of both; its padding rows, and padding tokens, are not compared.
        capture: stages to compare beside the features.
        tolerance: largest difference allowed, relative to the largest magnitude of a full value.
    """
    pairs = [(full.features, mine.features), *((full.stages[k], mine.stages[k]) for k in capture)]
    worst = max(_difference(_real(a, batch, full.mask), _real(b, batch, full.mask)) for a, b in pairs)
    if worst <= tolerance:
        return None
    return f"the cached path differs from the full one by {worst:.1e} of the largest value (allowed {tolerance:g})"


def _real(values: Tensor, batch: Batch, mask: Tensor | None) -> Tensor:
    """The values of rows and tokens that are no padding."""
    if mask is not None and values.dim() > 2 and values.shape[:2] == mask.shape:
        return values[mask & (batch.domains >= 0)[:, None]].float()
    return values[batch.domains >= 0].float()


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude; NaN equals NaN."""
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).max() if a.numel() else torch.zeros(())
    return float(torch.nan_to_num(gap / a.nan_to_num().abs().max().clamp(min=1e-12), nan=float("inf")))
