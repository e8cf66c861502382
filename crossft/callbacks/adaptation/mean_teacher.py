"""Mean teacher: agreement with an average of one's own past weights (Tarvainen & Valpola 2017)."""

from __future__ import annotations

import copy
import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.adaptation.roles import Ids, ids_of, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.functional import upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["MeanTeacher", "TeacherConsistency"]


class TeacherConsistency(LossTerm):
    """Squared difference of the class probabilities of student and teacher on unlabeled target rows.

    The teacher is an exponential average of the student over optimizer steps. It takes in the step before when a new
    one begins, so that all micro-batches of a step see the same teacher. It stays in evaluation mode, and its buffers
    are copies of the student's.

    Args:
        backbone: copied.
        head: copied.
        key: key of the head.
        targets: ids of the target domains.
        decay: largest decay alpha of the average; it is min(1 - 1/(t + 1), alpha) at optimizer step t.
        threshold: least confidence of the teacher for a row to count.
        ramp: share of training over which the loss grows.
    """

    clock: Tensor
    updates: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, key: str, targets: Ids, decay: float, threshold: float, ramp: float
    ) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), copy.deepcopy(head)
        self.requires_grad_(False).eval()
        self.key, self.targets, self.decay, self.threshold, self.ramp = key, targets, decay, threshold, ramp
        self.register_buffer("clock", torch.tensor(-1))
        self.register_buffer("updates", torch.tensor(0))
        self._last: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> TeacherConsistency:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The mean over target rows of the squared difference, averaged over classes; a scalar."""
        if step.batch.step != int(self.clock):
            if int(self.clock) >= 0:
                self._update(model)
            self.clock.fill_(step.batch.step)
        student = F.softmax(upcast(step.logits[self.key]), 1)
        teacher = self._predict(step)
        rows = step.rows(self.targets) & ~step.batch.labeled & (teacher.amax(1) >= self.threshold)
        losses = (student - teacher).square().mean(1)
        losses = torch.where(rows, losses, torch.zeros_like(losses))
        self._last = {"kept": step.mean(rows.to(losses.dtype), self.targets)}
        return self._strength(step.progress) * step.mean(losses, self.targets)

    def _strength(self, progress: float) -> float:
        """exp(-5 (1 - t/T)^2) over the first ``ramp`` of training, then 1."""
        if self.ramp == 0 or progress >= self.ramp:
            return 1.0
        return math.exp(-5.0 * (1.0 - progress / self.ramp) ** 2)

    @torch.no_grad()
    def _predict(self, step: StepOutput) -> Tensor:
        """[b, k] teacher probabilities on the student's own inputs."""
        set_domains(self.backbone, step.batch.domains)
        return F.softmax(upcast(self.head(self.backbone(step.batch.inputs).features)), 1)

    @torch.no_grad()
    def _update(self, model: HasBackbone) -> None:
        self.updates += 1
        alpha = min(1.0 - 1.0 / (int(self.updates) + 1), self.decay)
        for mine, theirs in ((self.backbone, model.backbone), (self.head, model.heads[self.key])):
            own: list[Tensor] = list(mine.parameters())
            new: list[Tensor] = list(theirs.parameters())
            torch._foreach_lerp_(own, new, 1.0 - alpha)
            for buffer, current in zip(mine.buffers(), theirs.buffers(), strict=True):
                buffer.copy_(current)

    def logs(self) -> dict[str, Tensor]:
        """Share of the target rows that count."""
        return self._last


class MeanTeacher(MethodCallback):
    """Mean teacher (Tarvainen & Valpola 2017), on unlabeled target rows as in French et al. 2018.

    Mean squared difference of the softmaxes of student and teacher. Both see the same augmented input: the published
    methods draw noise anew for each. What differs is the weights, and the student's dropout. The teacher costs one
    more forward over the batch; the task's own model, not the teacher, is what is evaluated.

    Args:
        weight: largest factor on the difference (3 in the code of French et al.).
        decay: alpha of the average, an optimizer step (0.99 in French et al., and in Tarvainen & Valpola while
            training starts).
        threshold: least confidence of the teacher (0.968 in French et al., who drop the ramp-up then); 0: all rows.
        ramp: share of training over which the weight grows as exp(-5 (1 - t/T)^2) (Tarvainen & Valpola: the first 80
            of 300 epochs or less).

    Raises:
        ConfigError: an argument out of range, targets with different label spaces, or a strategy that shards weights.
    """

    needs_target = "unlabeled"

    def __init__(self, weight: float = 3.0, decay: float = 0.99, threshold: float = 0.0, ramp: float = 0.25) -> None:
        super().__init__(weight)
        if not 0 <= decay < 1 or not 0 <= threshold < 1 or not 0 <= ramp <= 1:
            raise ConfigError(f"decay={decay} and threshold={threshold} must be in [0, 1), ramp={ramp} in [0, 1]")
        self.decay, self.threshold, self.ramp = decay, threshold, ramp

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the model and attach the term.

        Raises:
            ConfigError: the strategy shards: inside of the term the teacher is whole, and the model is not.
        """
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> LossTerm:
        """Copy the model as it is now."""
        key = shared_head(task, f"methods.{self.name}", ("target",))
        return TeacherConsistency(
            task.backbone, task.heads[key], key, ids_of(task, "target"), self.decay, self.threshold, self.ramp
        )
