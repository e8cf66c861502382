"""What trains: gradients, buffers and modes of a backbone's stages, and the check that they are still as set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crossft.backbones import Backbone
from crossft.errors import TrainingError
from crossft.types import Stage

if TYPE_CHECKING:
    from crossft.tasks.base import Task

__all__ = ["Trainability", "check_trainability", "freeze_others_", "hold_frozen_", "trainable_names"]


class Trainability:
    """What a task was told to train, and whether it still does.

    Attributes:
        frozen: names of the stages in which nothing trains.
        buffers: copies of the buffers of each frozen stage, from the first check after it froze.
        due: whether something has happened since the last check that may have changed what trains.
    """

    def __init__(self) -> None:
        self.frozen: frozenset[str] = frozenset()
        self.buffers: dict[str, list[Tensor]] = {}
        self.due = True
        self._expected: frozenset[str] = frozenset()

    def choose_(self, backbone: Backbone, parameters: Iterable[nn.Parameter] | None) -> None:
        """Make exactly these parameters of the backbone train; None begins anew, with those that do."""
        if parameters is None:
            parameters, self.buffers = [p for p in backbone.parameters() if p.requires_grad], {}
        self.frozen = freeze_others_(backbone.stages, parameters)
        self.buffers = {name: kept for name, kept in self.buffers.items() if name in self.frozen}
        self.due = True
        self._expected = trainable_names(backbone)

    def check(self, task: Task) -> None:
        """Check parameters, modes and buffers of the backbone, and the optimizer's groups.

        Args:
            task: within a fit, in training mode.

        Raises:
            TrainingError: as ``check_trainability``; buffers of a frozen stage have changed; a parameter of the task
                is not in the optimizer, or not at the weight decay of its group.
        """
        backbone = task.backbone
        check_trainability(backbone, self.frozen, self._expected)
        for stage in (s for s in backbone.stages if s.name in self.frozen):
            now = _buffers(stage)
            kept = self.buffers.setdefault(stage.name, [b.clone() for b in now])
            if not all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)):
                raise TrainingError(
                    f"stage {stage.name!r} is frozen but its buffers have changed: something ran it in training mode, "
                    "or wrote its BatchNorm statistics; leave these to model.batchnorm"
                )
        _check_groups(task)
        self.due = False


def freeze_others_(stages: Sequence[Stage], parameters: Iterable[nn.Parameter]) -> frozenset[str]:
    """Make exactly these parameters train and return the names of the stages in which nothing does.

    A parameter that stops training loses its gradient, so no optimizer moves it, not even by momentum or decay.
    """
    chosen = {id(p) for p in parameters}
    frozen = set()
    for stage in stages:
        owned = stage.parameters()
        for parameter in owned:
            parameter.requires_grad_(id(parameter) in chosen)
            if not parameter.requires_grad:
                parameter.grad = None
        if owned and not any(p.requires_grad for p in owned):
            frozen.add(stage.name)
    return frozenset(frozen)


def hold_frozen_(backbone: Backbone, frozen: Collection[str]) -> None:
    """Put the modules of frozen stages into evaluation mode; called again after each ``train()``.

    Modules that lie between stages and hold nothing (dropout of position embeddings, of pooled features) are held
    too where they are registered before the first stage that trains.
    """
    if not frozen:
        return
    stage_of = {id(m): stage.name for stage in backbone.stages for owner in stage.modules for m in owner.modules()}
    held = True
    for module in backbone.modules():
        stage = stage_of.get(id(module))
        if stage in frozen or (stage is None and held and not any(True for _ in module.children())):
            module.eval()
        elif stage is not None:
            held = False


def trainable_names(backbone: nn.Module) -> frozenset[str]:
    """Names of the backbone's parameters that train."""
    return frozenset(name for name, p in backbone.named_parameters() if p.requires_grad)


def check_trainability(backbone: Backbone, frozen: Collection[str], expected: Collection[str]) -> None:
    """Check that the backbone trains as it was told; cheap enough for every validation and phase.

    Args:
        backbone: in training mode, as within a fit.
        frozen: names of the stages in which nothing trains.
        expected: names of the parameters that train, as ``trainable_names`` gave them when they were set.

    Raises:
        TrainingError: a parameter trains or is frozen against what was set, a frozen one holds a gradient, or a
            module of a frozen stage is in training mode.
    """
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad != (name in expected):
            state = "trains" if parameter.requires_grad else "is frozen"
            raise TrainingError(
                f"backbone parameter {name!r} {state}, against what was set: a second method, or code outside of "
                "crossft, has changed requires_grad; leave that to one method"
            )
        if not parameter.requires_grad and parameter.grad is not None:
            raise TrainingError(
                f"backbone parameter {name!r} is frozen but holds a gradient, so the optimizer moves it"
            )
    for stage in backbone.stages:
        modules = (m for owner in stage.modules for m in owner.modules()) if stage.name in frozen else ()
        if any(module.training for module in modules):
            raise TrainingError(
                f"stage {stage.name!r} is frozen but in training mode: dropout or batch statistics are on. Something "
                "called train() on a part of the model; call it on the task"
            )


def _check_groups(task: Task) -> None:
    """Check that the optimizer holds every parameter, frozen ones too, at the weight decay of its group."""
    groups = [g for optimizer in task.trainer.optimizers for g in optimizer.param_groups]
    held = {id(p): g.get("weight_decay", 0.0) for g in groups for p in g["params"]}
    expected = {id(p): g["weight_decay"] for g in task.named_groups() for p in g["params"]}
    for name, parameter in task.named_parameters():
        if id(parameter) not in held:
            raise TrainingError(
                f"parameter {name!r} is in no group of the optimizer, so it could never train; give the optimizer all "
                "of named_groups(), what is frozen too"
            )
        decay = held[id(parameter)]
        wanted = expected.get(id(parameter), decay)
        if decay != wanted:
            raise TrainingError(
                f"parameter {name!r} has weight_decay={decay} in the optimizer, against {wanted} in the task's groups: "
                "a callback, or a checkpoint of other settings, has changed it; set it in the task's optimizer alone"
            )


def _buffers(stage: Stage) -> list[Tensor]:
    """A stage's buffers; those that are no part of a state dict (caches of positions) are left out."""
    return [
        buffer
        for owner in stage.modules
        for module in owner.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
