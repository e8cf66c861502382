"""The gradient of a quadratic penalty, added in place without a copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["add_pull_"]

BLOCK = 1 << 17
"""Elements worked on at a time on a CPU: what is between them stays in its cache."""
GROUP = 1 << 22
"""Elements that one call on a GPU works on (or one tensor that has more): its differences are no copy of the model."""


@torch.no_grad()
def add_pull_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    scale: float,
    importance: Sequence[Tensor] | None = None,
) -> None:
    """gradient += scale * importance * (weight - start), tensor by tensor.

    The difference is taken first: scale * weight - scale * start would round to a pull even where the two are equal.

    Args:
        gradients: changed in place.
        weights: of the same shapes.
        starts: of the same shapes.
        scale: a number.
        importance: of the same shapes; None for ones.
    """
    if not gradients:
        return
    factors: Sequence[Tensor | None] = [None] * len(gradients) if importance is None else importance
    if gradients[0].is_cuda:
        for first, last in _groups([g.numel() for g in gradients]):
            pull = torch._foreach_sub(list(weights[first:last]), list(starts[first:last]))
            if importance is not None:  # out of place: half times float32 is float32
                pull = torch._foreach_mul(pull, list(importance[first:last]))
            torch._foreach_mul_(pull, scale)
            torch._foreach_add_(list(gradients[first:last]), pull)
        return
    for g, w, s, f in zip(gradients, weights, starts, factors, strict=True):
        whole = [g, w, s] if f is None else [g, w, s, f]
        flat = g.numel() > BLOCK and all(t.is_contiguous() for t in whole)
        for parts in zip(*(t.view(-1).split(BLOCK) if flat else (t,) for t in whole), strict=True):
            pull = parts[1] - parts[2]
            if f is not None:  # half times float32 is float32, which a half cannot hold in place
                pull = pull.mul_(parts[3]) if pull.dtype == f.dtype else pull * parts[3]
            parts[0].add_(pull.mul_(scale))


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut into runs [first, last) of at most GROUP elements, or of one tensor."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > GROUP:
            yield first, i
            first, total = i, 0
        total += size
    yield first, len(sizes)
