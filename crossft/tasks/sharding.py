"""FSDP2: each process holds a slice of every parameter (``lightning.pytorch.strategies.ModelParallelStrategy``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from crossft.backbones.batchnorm import batch_norms
from crossft.errors import ConfigError
from crossft.types import Encoded, Stage

if TYPE_CHECKING:
    from crossft.tasks.base import Task

__all__ = ["is_sharded", "own_slice", "shard_", "sliced", "sliced_state", "whole"]


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are slices."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def own_slice(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its slice (which may be empty), or all of one that is not cut."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(value: Any) -> Any:
    """A nested state with every sliced tensor put together, on the CPU of the first process, and None on the others.

    Every process calls it. It is one tensor at a time that is whole on a device; what is not sliced stays as it is.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


def sliced(value: Tensor, like: Tensor) -> Tensor:
    """The slice of a whole tensor that this process holds of ``like``; ``value`` itself where that is not sliced."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    # each process has the whole tensor and cuts its own slice: nothing is sent, and the copy lets the rest go
    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None).clone()


def sliced_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors as this process's slices, as far as ``module`` is sharded."""
    own = dict(module.named_parameters())
    return {k: sliced(v, own[k]) if k in own and isinstance(v, Tensor) else v for k, v in state.items()}


def shard_(task: Task) -> None:
    """Shard a task over the data-parallel processes of its device mesh; nothing happens where it has none.

    Every block of a stage is a unit of its own, then what is left of the backbone, each head and each term. A unit
    is cut again after its forward, so outside of a step every parameter is its process's slice, and what trains may
    change between steps: a unit may hold frozen and trainable parameters, and only those with a gradient are reduced.
    What is sharded already stays as it is, so a task may go from one trainer to the next, and gain terms in between.

    Raises:
        ConfigError: the strategy also splits tensors, or BatchNorm statistics would differ between processes.
    """
    if task.device_mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    tensors = task.device_mesh["tensor_parallel"].size()
    if tensors > 1:
        raise ConfigError(
            f"trainer.strategy: tensor_parallel_size={tensors} splits single layers, which "
            "no backbone here has a plan for; set tensor_parallel_size: 1 and data_parallel_size to all processes"
        )
    if task.batchnorm != "frozen" and any(True for _ in batch_norms(task.backbone)):
        raise ConfigError(
            f"model.batchnorm={task.batchnorm!r}: under FSDP2 nothing makes BatchNorm statistics equal on all "
            "processes; set model.batchnorm=frozen, or use trainer.strategy=ddp"
        )
    _look_into_outputs()
    mesh = task.device_mesh["data_parallel"]
    for unit in (*_units(task.backbone.stages), task.backbone, *task.heads.values(), *task.attachments.terms.values()):
        if not isinstance(unit, FSDPModule) and any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)


@cache
def _look_into_outputs() -> None:
    """Let FSDP2 find the tensors that a backbone returns: it shards again before their backward, or loses gradients."""
    from torch.export import register_dataclass

    register_dataclass(Encoded)


def _units(stages: Iterable[Stage]) -> Iterator[nn.Module]:
    """The stages' modules that have parts; of a plain container, which has no forward of its own, its entries.

    A single layer is left to the backbone's unit: some models read its weight without calling it.
    """
    for stage in stages:
        waiting = list(stage.modules)
        while waiting:
            module = waiting.pop(0)
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                waiting = [*module.children(), *waiting]
            elif any(True for _ in module.children()):
                yield module
