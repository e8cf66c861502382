"""LwF: learning without forgetting, distillation from the starting model (Li & Hoiem 2016)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rows import Which, ids_of, refuse_absent
from crossft.callbacks.retention.teacher import Teacher, TeacherTerm, old_heads
from crossft.errors import ConfigError
from crossft.functional.distillation import distillation
from crossft.tasks import Task
from crossft.types import HasBackbone, Kind, LossTerm, StepOutput

__all__ = ["LwF", "OldOutputs"]


class OldOutputs(TeacherTerm):
    """Divergence of the old heads' outputs from the teacher's, on the rows of some domains.

    Args:
        teacher: the starting model with the old heads.
        kinds: kind of label space of each old head.
        ids: domain ids of the rows.
        temperature: T.
        train_heads: whether heads that only the source uses train along.
    """

    def __init__(
        self, teacher: Teacher, kinds: dict[str, Kind], ids: tuple[int, ...], temperature: float, train_heads: bool
    ) -> None:
        super().__init__(teacher)
        self.kinds, self.ids, self.temperature = kinds, ids, temperature
        self.trains_source_head = train_heads

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Sum over old heads of the mean over rows of T^2 KL(teacher || student); a scalar."""
        old = self.teacher.logits(self.teacher(step.batch, model).features)
        values = [
            step.mean(distillation(step.logits[key], old[key], self.temperature, kind), self.ids)
            for key, kind in self.kinds.items()
        ]
        return torch.stack(values).sum()


class LwF(MethodCallback):
    """Learning without forgetting (Li & Hoiem 2016, eq. 1-3): the source's outputs on target rows stay as they were.

    The teacher is the model the leg starts from, in evaluation mode, on the same augmented input as the student. The
    source's head is kept: a label space of its own keeps a head of its own, which trains along (as in the paper); where
    source and target share label names they share the head. Needs no source data.

    Against the paper, the divergence stands for the cross-entropy (they differ by a constant), T^2 is included so that
    the weight does not depend on T, and there is no warm-up of a new head alone (use a freezing phase for that).

    Args:
        weight: lambda_o (1 in the paper, section 3).
        temperature: T (2 in the paper).
        rows: ``target``, or ``all`` to hold the outputs on every row of the batch (with rehearsal).
        train_heads: whether heads of the source alone train.

    Raises:
        ConfigError: no source domain, or ``temperature`` is not positive.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 2.0,
        rows: Which = "target",
        train_heads: bool = True,
    ) -> None:
        super().__init__(weight)
        if temperature <= 0.0:
            raise ConfigError(f"temperature={temperature} must be positive; 1 leaves the outputs as they are")
        self.temperature, self.rows, self.train_heads = temperature, rows, train_heads

    def build(self, task: Task) -> LossTerm:
        """Copy the model as it is now: the leg's start."""
        keys = old_heads(task, self.name)
        kinds: dict[str, Kind] = {k: next(d.kind for d in task.domains if task.head_keys[d.name] == k) for k in keys}
        ids = ids_of(task, self.rows)
        teacher = Teacher(task.backbone, {k: task.heads[k] for k in keys})
        return OldOutputs(teacher, kinds, ids, self.temperature, self.train_heads and self.weight > 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without rows to work on."""
        assert isinstance(pl_module, Task)
        refuse_absent(trainer, self.name, ids_of(pl_module, self.rows))
