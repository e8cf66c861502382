"""Random mixtures: of weights with their starting point (Mixout), of two normalizations (StochNorm)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drawn_mask", "mixout"]


def mixout(weight: Tensor, start: Tensor, mask: Tensor, p: float) -> Tensor:
    """Weights of which a share p is put back to the start, scaled so that their mean is the weight itself.

    Lee, Cho & Kang 2020 (Mixout), section 3 and eq. 4: (mask * start + (1 - mask) * weight - p * start) / (1 - p). The
    gradient by the weight is (1 - mask) / (1 - p); the released code leaves 1 / (1 - p) out of its backward.

    Args:
        weight: any shape.
        start: the same shape; no gradient flows to it.
        mask: the same shape, True where the start stands in, each with probability p.
        p: in [0, 1).

    Example:
        >>> w, w0 = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> mixout(w, w0, torch.tensor([True, False]), 0.5)
        tensor([1., 3.])
    """
    start = start.detach()
    return (torch.where(mask, start, weight) - p * start) / (1.0 - p)


def drawn_mask(shape: tuple[int, ...], p: float, seed: int, device: torch.device) -> Tensor:
    """A bool mask, True with probability p, computed from a seed; the global generator is untouched."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device) < p
