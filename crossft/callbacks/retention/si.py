"""SI: synaptic intelligence, an importance that is summed up along the way (Zenke et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from crossft.callbacks.retention.importance import IMPORTANCE, Importance, carried
from crossft.callbacks.retention.quadratic import QuadraticMethod, QuadraticPenalty
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import WeightPenalty

__all__ = ["SI", "PathPenalty"]

PATH = "path:"


class PathPenalty(QuadraticPenalty):
    """The quadratic penalty, and the path integral of the unregularized gradient along the weights' way.

    ``note`` before an optimizer step and ``advance`` after it add -g (w_after - w_before) to each weight's path
    (Zenke et al. 2017, eq. 3): the share of the loss's fall that the weight brought about, to first order in the step.
    Memory: the path, and between the two calls a copy of weights and gradients.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        for name, parameter in self.named.items():
            zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_buffer(PATH + name.replace(".", "/"), zeros)
        self._noted: list[tuple[str, Tensor, Tensor]] = []

    def path_of(self, name: str) -> Tensor:
        """Path integral of a parameter, float32."""
        return self.get_buffer(PATH + name.replace(".", "/"))

    @torch.no_grad()
    def note(self) -> None:
        """Keep weights and gradients; called when gradients are whole and before penalties are added to them."""
        own = ((n, p) for n, p in self.named.items() if p.grad is not None and p.requires_grad)
        self._noted = [(n, p.detach().clone(), p.grad.detach().clone()) for n, p in own if p.grad is not None]

    @torch.no_grad()
    def advance(self) -> None:
        """Add the step that was done since ``note``; a step that did not happen (fp16 overflow) adds nothing."""
        for name, before, gradient in self._noted:
            moved = self.named[name].float() - before.float()
            share = torch.where(moved == 0, torch.zeros_like(moved), gradient.float() * moved)
            self.path_of(name).sub_(share)
        self._noted = []

    @torch.no_grad()
    def total(self, damping: float) -> dict[str, Tensor]:
        """Importance of earlier legs plus relu(path) / (distance^2 + damping) of this one (eq. 5, relu as released)."""
        return {
            n: self.importance_of(n)
            + self.path_of(n).clamp(min=0) / ((p.float() - self.anchor_of(n).float()).square() + damping)
            for n, p in self.named.items()
        }


class SI(QuadraticMethod):
    """Synaptic intelligence (Zenke, Poole & Ganguli 2017, Continual Learning Through Synaptic Intelligence, eq. 3-5).

    Importance is summed up while a domain is learned, so the method stands in two legs: in ``source_leg.methods``,
    where it records (nothing is held yet), and in ``methods``, where what was recorded holds the weights, and the
    recording goes on for the leg after. It reads no data. A leg that starts from no other run only records.

    The gradient is the unregularized one: task loss and loss terms, all-reduced and unscaled, before weight penalties.
    Path sums can be negative; they count as 0, as in the released code. The penalty is weight/2 * sum of
    Omega (w - w0)^2 (the paper's eq. 4 has c and no 1/2).

    Args:
        weight: twice the paper's c (1 on split MNIST, section 5.1).
        damping: xi (0.001 on split MNIST, section 5.1).
        importance: a file of an earlier run to hold the weights by. Default: the run this one starts from.

    Raises:
        ConfigError: ``damping`` is not positive, or the run this one starts from has recorded nothing.
    """

    def __init__(self, weight: float = 2.0, damping: float = 1e-3, importance: str | None = None) -> None:
        super().__init__(weight)
        if damping <= 0.0:
            raise ConfigError(
                f"damping={damping} must be positive: it bounds the importance of weights that did not move"
            )
        self.damping, self.importance = damping, importance

    def build(self, task: Task) -> WeightPenalty:
        """Anchor the backbone at its weights of now."""
        penalty = super().build(task)
        assert isinstance(penalty, QuadraticPenalty)
        return PathPenalty(penalty.named)

    def _path(self, task: LightningModule) -> PathPenalty:
        assert isinstance(task, Task)
        penalty = self.penalty(task)
        assert isinstance(penalty, PathPenalty)
        return penalty

    def importance_for(self, task: Task, data: Any) -> Importance:
        """What earlier legs have recorded; zero in the first."""
        path = self.importance or carried(task, self.name)
        if path is not None:
            return Importance.load(path)
        zeros = {n: torch.zeros(p.shape, device=p.device) for n, p in task.backbone.named_parameters()}
        return Importance(zeros, {"kind": "si", "legs": 0})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the unregularized gradient."""
        self._path(pl_module).note()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step that was done, if one was."""
        self._path(pl_module).advance()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the importance for the run that starts from this one; also where a resume has no step left to train."""
        assert isinstance(pl_module, Task)
        penalty, anchors = self._path(pl_module), pl_module.attachments.anchors
        if anchors is not None:
            values = {IMPORTANCE + n.replace(".", "/"): v for n, v in penalty.total(self.damping).items()}
            legs = int(penalty.provenance.get("legs", 0)) + 1
            found = Importance({}, {"kind": "si", "damping": self.damping, "legs": legs})
            anchors.put(f"{self.name}.final", values, found.header)
