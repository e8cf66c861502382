"""Quadratic penalties: every weight is held at its starting point by its own importance. EWC, MAS and SI share them."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.importance import ANCHOR, IMPORTANCE, Importance, carried, may_train
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import TrainingError
from crossft.functional.pull import add_pull_
from crossft.tasks import Task
from crossft.types import WeightPenalty

__all__ = ["QuadraticMethod", "QuadraticPenalty"]


class QuadraticPenalty(WeightPenalty):
    """weight/2 * sum of F_i (w_i - w_i^0)^2, outside the autograd graph, once an optimizer step.

    Anchors are the weights at construction, importance is zero until ``fill``. Both are constants: stored once a run.
    Memory: anchors in the weights' dtype, importance in float32 (under ``trainer.precision=*-true`` too, where half
    would lose small values), and nothing a step.

    Args:
        parameters: by name within the backbone.

    Attributes:
        ready: whether ``fill`` was called, in this run or before a resume.
        provenance: of the importance.
    """

    ready: Tensor

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.named = dict(parameters)
        self.provenance: dict[str, Any] = {}
        self._left_out: frozenset[str] = frozenset()
        for name, parameter in self.named.items():
            key = name.replace(".", "/")
            self.register_buffer(ANCHOR + key, parameter.detach().clone())
            zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_buffer(IMPORTANCE + key, zeros)
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuadraticPenalty:
        """Move all, but convert nothing else than anchors: a half of importance would be none where it is small."""
        single = {n: b for n, b in self._buffers.items() if b is not None and not n.startswith(ANCHOR)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in single.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers that never change during a run."""
        return tuple(n for n, _ in self.named_buffers() if n.startswith((ANCHOR, IMPORTANCE)))

    def get_extra_state(self) -> dict[str, Any]:
        """The provenance, which a resumed run hands on."""
        return dict(self.provenance)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.provenance = dict(state)
        self._left_out = frozenset(state.get("left_out", ()))

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of the stored constants says."""
        return {"importance": json.dumps(self.provenance)}

    def importance_of(self, name: str) -> Tensor:
        """Importance of a parameter."""
        return self.get_buffer(IMPORTANCE + name.replace(".", "/"))

    def anchor_of(self, name: str) -> Tensor:
        """Starting point of a parameter."""
        return self.get_buffer(ANCHOR + name.replace(".", "/"))

    @torch.no_grad()
    def fill(
        self, values: Mapping[str, Tensor], provenance: Mapping[str, Any], anchors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Set the importance of every parameter, and where ``anchors`` says so, what it is held at."""
        for name in self.named:
            self.importance_of(name).copy_(values[name])
        for name, anchor in (anchors or {}).items():
            self.anchor_of(name).copy_(anchor)
        self.set_extra_state(dict(provenance))
        self.ready.fill_(True)

    def _training(self) -> tuple[list[nn.Parameter], list[Tensor], list[Tensor]]:
        names = [n for n, p in self.named.items() if p.requires_grad]
        if self._left_out and (thawed := next((n for n in names if n in self._left_out), None)):
            raise TrainingError(
                f"{thawed} trains, and its importance was not measured, since no phase was to train it: let "
                "GradualUnfreezing change what trains, or set the task's `thawing` before the fit starts"
            )
        weights = [self.named[n] for n in names]
        return weights, [self.anchor_of(n) for n in names], [self.importance_of(n) for n in names]

    @torch.no_grad()
    def value(self) -> Tensor:
        """1/2 sum of F (w - w0)^2 over what trains, a scalar in float32."""
        terms = [0.5 * ((w.float() - a.float()).square() * f).sum() for w, a, f in zip(*self._training(), strict=True)]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.ready.device)

    @torch.no_grad()
    def add_grad_(self, weight: float) -> None:
        """Add weight * F (w - w0) to the gradients of what trains."""
        weights, anchors, importance = self._training()
        if weight == 0.0 or not weights:
            return
        for parameter in weights:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_pull_([p.grad for p in weights if p.grad is not None], weights, anchors, weight, importance)


class QuadraticMethod(MethodCallback):
    """Base of the methods whose penalty is quadratic. The importance is found when the fit starts, unless resumed.

    That is after a checkpoint was restored, so a resumed run takes the importance it was saved with; and on the
    training device.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then attach."""
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> WeightPenalty:
        """Anchor the backbone at its weights of now, those the leg starts from; a weight shared with a head is left."""
        heads = {id(p) for p in task.heads.parameters()}
        return QuadraticPenalty({n: p for n, p in task.backbone.named_parameters() if id(p) not in heads})

    def penalty(self, task: Task) -> QuadraticPenalty:
        """The penalty that was attached."""
        found = task.attachments.penalties[self.name]
        assert isinstance(found, QuadraticPenalty)
        return found

    @abstractmethod
    def importance_for(self, task: Task, data: Any) -> Importance:
        """The importance this leg starts with."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the importance, once a run."""
        assert isinstance(pl_module, Task)
        penalty = self.penalty(pl_module)
        if not bool(penalty.ready):
            needed = may_train(pl_module)
            if not needed:
                rank_zero_warn(f"methods.{self.name} holds the backbone, of which nothing trains in this run")
            found = self.importance_for(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            path = getattr(self, "importance", None) or f"methods.{self.name}"
            penalty.fill(found.fit_to(penalty.named, path, needed), found.provenance, found.anchors)

    def before(self, task: Task) -> Importance | None:
        """What the run that this one starts from held by under this method's name, on the task's device."""
        path = carried(task, self.name, required=False)
        if path is None:
            return None
        found = Importance.load(path)
        if found.provenance.get("rows") == 0:  # nothing trained there, so nothing was measured
            return None
        named = self.penalty(task).named
        anchors = {n: found.anchors[n].to(p.device) for n, p in named.items() if n in found.anchors}
        return Importance(found.fit_to(named, path, may_train(task)), found.provenance, anchors)
