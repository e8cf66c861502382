"""Training strategies and what trains: which can be right, and wrapping DDP again when the set changes."""

from __future__ import annotations

import gc

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import distributed as dist
from torch import nn

from crossft.errors import ConfigError, TrainingError
from crossft.tasks import Task

__all__ = ["check_ranks_equal", "refuse_fused", "refuse_unwrappable", "rewrap"]


def refuse_fused(trainer: Trainer | None, method: str) -> None:
    """Refuse strategies in which a parameter cannot be frozen by itself.

    Raises:
        ConfigError: the trainer's strategy fuses parameters or groups.
    """
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, DeepSpeedStrategy):
        reason = "it fuses the optimizer's groups, so stages lose their own learning rates and frozen ones their place"
    elif isinstance(strategy, FSDPStrategy):
        reason = "it flattens parameters, and a flat parameter trains as a whole or not at all"
    else:
        return
    raise ConfigError(
        f"trainer.strategy={type(strategy).__name__} cannot freeze for methods.{method}: {reason}; use ddp"
    )


def refuse_unwrappable(trainer: Trainer | None, method: str) -> None:
    """Refuse strategies in which the set of trainable parameters cannot change within a fit.

    Raises:
        ConfigError: the trainer's strategy is none of one device, DDP and FSDP2 (``ModelParallelStrategy``).
    """
    refuse_fused(trainer, method)
    strategy = getattr(trainer, "strategy", None)
    known = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    if strategy is not None and not isinstance(strategy, known):
        raise ConfigError(
            f"trainer.strategy={type(strategy).__name__} cannot change what trains within a fit for methods.{method}: "
            "only one device, ddp and ModelParallelStrategy are known to keep all processes equal; use one of them, or "
            "freeze once"
        )


def rewrap(trainer: Trainer, task: Task) -> None:
    """Wrap the task with DDP again, so that its reducer knows exactly what trains now.

    The reducer registers the parameters that train when DDP wraps, and never others: what thaws later is not
    all-reduced, and the processes drift apart without a word. Wrapping broadcasts the first process's weights, which
    would hide a drift that is there already, so the processes are compared before. Nothing happens without DDP: FSDP2
    reduces whatever has a gradient, and each process holds a slice, so there is nothing to compare.

    Raises:
        TrainingError: the processes do not hold the same weights.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    check_ranks_equal(task, trainer.global_step)
    for parameter in task.parameters():
        parameter.grad = None  # views into the former reducer's buckets
    strategy.model = task
    gc.collect()  # the former reducer takes its hooks along
    strategy.configure_ddp()


@torch.no_grad()
def check_ranks_equal(module: nn.Module, step: int) -> None:
    """Compare a hash of every parameter over the processes: two collectives of one number a parameter.

    Buffers are left out: running statistics differ between processes by design until DDP broadcasts them.

    Raises:
        TrainingError: on every process, where any parameter differs; it names the first.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    named = list(module.named_parameters())
    hashes = torch.stack([torch.hash_tensor(p.detach()).view(torch.int64) for _, p in named])
    highest, lowest = hashes.clone(), hashes
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    differing = (highest != lowest).nonzero().flatten().tolist()
    if differing:
        raise TrainingError(
            f"the processes hold different weights at optimizer step {step}: {len(differing)} of {len(named)} "
            f"parameters, the first is {named[differing[0]][0]!r}. Its gradient was not averaged over the processes, "
            "as when requires_grad changes after DDP has wrapped; change what trains through crossft.callbacks.freezing"
        )
