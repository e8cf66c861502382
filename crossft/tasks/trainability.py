"""What trains: gradients, buffers and modes of a backbone's stages, and the check that they are still as set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from crossft.backbones import Backbone
from crossft.errors import TrainingError
from crossft.types import Stage

__all__ = ["check_trainability", "freeze_others_", "hold_frozen_", "trainable_names"]


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
