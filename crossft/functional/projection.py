"""Gradients that do not disagree with a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["project_off"]


@torch.no_grad()
def project_off(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where g . g_ref < 0, take the part along g_ref out of g, in place (Chaudhry et al. 2019, A-GEM, eq. 11).

    Afterwards g . g_ref >= 0 up to rounding, so a small step along -g does not raise the reference's loss.

    Args:
        gradients: g, cut into tensors; changed in place.
        reference: g_ref, in the same pieces.

    Returns:
        Scalars in float64: g . g_ref before, and ||g_ref||^2.
    """
    dot = torch.stack([(g.double() * r.double()).sum() for g, r in zip(gradients, reference, strict=True)]).sum()
    square = torch.stack([r.double().square().sum() for r in reference]).sum()
    if float(dot) < 0.0 and float(square) > 0.0:
        share = float(dot / square)
        for g, r in zip(gradients, reference, strict=True):
            g.sub_(r.to(g.dtype), alpha=share)
    return dot, square
