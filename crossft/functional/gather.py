"""Rows of all processes, with gradients: for statistics of a batch that are not averages of its shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["gather_rows", "mean_over_processes"]


def gather_rows(*values: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the rows of all processes, in rank order; numbers of rows may differ between processes.

    Every process then computes the same statistic of the same rows. The backward hands each process the gradient of
    its own rows times the number of processes, without communication: after DDP's average over processes the
    gradient is that of one process that holds all rows. Without a process group the values come back as they are.

    Args:
        *values: [b, ...] tensors of one length b; the trailing shapes agree over processes.

    Returns:
        One tensor [sum of b, ...] for each value.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    world, device = dist.get_world_size(), values[0].device
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(values[0])], device=device))
    sizes = tuple(int(n) for n in lengths)
    return tuple(_Gather.apply(v, sizes) if v.requires_grad else _gathered(v, sizes) for v in values)


def _gathered(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    padded = value.new_zeros((max(sizes), *value.shape[1:]))
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
        rank = dist.get_rank()
        ctx.start, ctx.length, ctx.world = sum(sizes[:rank]), sizes[rank], len(sizes)
        return _gathered(value.detach(), sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.start : ctx.start + ctx.length] * ctx.world, None


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of ``value`` over all processes, with gradients that are right after DDP's average.

    Every process computes the same function of the mean; the backward is the identity, since the mean's 1/world and
    the world of DDP's average cancel.

    Args:
        value: any shape, the same on every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    mean: Tensor = _Mean.apply(value)
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
