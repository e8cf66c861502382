"""A frozen copy of the model a leg starts from."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from crossft.backbones.batchnorm import set_domains
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Batch, Encoded, HasBackbone, LossTerm

__all__ = ["Teacher", "TeacherTerm", "check_known", "old_heads"]


class Teacher(nn.Module):
    """Backbone and some heads as they were: in evaluation mode whatever ``train()`` is called, and without gradients.

    Args:
        backbone: copied.
        heads: copied, by key.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.heads = nn.ModuleDict({k: copy.deepcopy(h) for k, h in (heads or {}).items()})
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch, model: HasBackbone, capture: Collection[str] = ()) -> Encoded:
        """Encode the batch's own inputs: what the student sees, augmentation and all.

        Where ``model`` keeps values of networks that do not change, a sample's are computed once.
        """
        set_domains(self.backbone, batch.domains)
        if model.prefix is not None:
            return cast(Encoded, model.prefix.encode_constant(model, self.backbone, batch, capture))
        return cast(Encoded, self.backbone(batch.inputs, capture=capture))

    @torch.no_grad()
    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """[b, k] by head key."""
        return {key: head(features) for key, head in self.heads.items()}


class TeacherTerm(LossTerm):
    """Base of the loss terms with a teacher; the teacher is constant, so it is stored once a run."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the tensors that never change during a run."""
        return tuple(k for k in self.state_dict() if k.startswith("teacher."))


def check_known(task: Task, keys: Iterable[str], what: str) -> None:
    """Refuse a head that nothing has trained: its outputs are those of random weights.

    Raises:
        ConfigError: one of these heads is new in this run.
    """
    new = set() if task.known_heads is None else {*keys} - task.known_heads
    if new:
        names = ", ".join(d.name for d in task.domains if task.head_keys[d.name] in new)
        raise ConfigError(
            f"{what} reads the head of {names}, which nothing has trained yet: "
            "fit the source first (source_leg: {}), or start from a run that has (init)"
        )


def old_heads(task: Task, name: str) -> list[str]:
    """Keys of the heads of the source domains.

    Raises:
        ConfigError: the run has no source domain, or nothing has trained its head, so no head knows anything yet.
    """
    keys = list(dict.fromkeys(task.head_keys[d.name] for d in task.domains if d.role == "source"))
    if not keys:
        raise ConfigError(
            f"methods.{name} holds the outputs of the source's head, and the run has no source domain; "
            "set data.source, or hold features instead (crossft.callbacks.retention.FeatureDistillation)"
        )
    check_known(task, keys, f"methods.{name}")
    return keys
