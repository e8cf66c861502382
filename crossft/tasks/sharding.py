"""FSDP2: each process holds a slice of every parameter (``lightning.pytorch.strategies.ModelParallelStrategy``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from crossft.backbones.batchnorm import batch_norms
from crossft.errors import ConfigError
from crossft.types import Encoded, Stage

if TYPE_CHECKING:
    from crossft.tasks.base import Task

__all__ = ["shard_"]


def shard_(task: Task) -> None:
    """Shard a task over the data-parallel processes of its device mesh; nothing happens where it has none.

    Every block of a stage is a unit of its own, then what is left of the backbone, each head and each term. A unit
    is cut again after its forward, so outside of a step every parameter is its process's slice, and what trains may
    change between steps: a unit may hold frozen and trainable parameters, and only those with a gradient are reduced.

    Raises:
        ConfigError: the strategy also splits tensors, or BatchNorm statistics would differ between processes.
    """
    if task.device_mesh is None:
        return
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    if any(isinstance(p, DTensor) for p in task.parameters()):
        return
    tensors = task.device_mesh["tensor_parallel"].size()
    if tensors > 1:
        raise ConfigError(
            f"trainer.strategy: tensor_parallel_size={tensors} splits single layers, which "
            "no backbone here has a plan for; set tensor_parallel_size: 1 and data_parallel_size to all processes"
        )
    if task.batchnorm != "frozen" and any(True for _ in batch_norms(task.backbone)):
        raise ConfigError(
            f"model.batchnorm={task.batchnorm!r}: under trainer.strategy=ModelParallelStrategy nothing makes BatchNorm "
            "statistics equal on all processes; set model.batchnorm=frozen, or use trainer.strategy=ddp"
        )
    _look_into_outputs()
    mesh = task.device_mesh["data_parallel"]
    for unit in (*_units(task.backbone.stages), task.backbone, *task.heads.values(), *task.attachments.terms.values()):
        if any(True for _ in unit.parameters()):
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
