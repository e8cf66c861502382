"""Feature distillation: the starting model's features stay (Jung et al. 2016; Romero et al. 2015)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rows import Which, ids_of, refuse_absent
from crossft.callbacks.retention.teacher import Teacher, TeacherTerm
from crossft.functional.distillation import feature_distance
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["FeatureDistillation", "OldFeatures"]


class OldFeatures(TeacherTerm):
    """Half the mean squared difference of features from the teacher's.

    Args:
        teacher: the starting model.
        ids: domain ids of the rows.
        stages: stages whose outputs are held; none: the pooled features.
    """

    def __init__(self, teacher: Teacher, ids: tuple[int, ...], stages: tuple[str, ...]) -> None:
        super().__init__(teacher)
        self.ids, self.needs_stages = ids, stages

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Sum over stages of the mean over rows; a scalar."""
        old = self.teacher(step.batch, model, capture=self.needs_stages)
        if not self.needs_stages:
            return step.mean(feature_distance(step.features, old.features), self.ids)
        values = []
        for name in self.needs_stages:
            own = step.stages[name]
            text = step.mask is not None and own.ndim == 3 and own.shape[:2] == step.mask.shape
            distance = feature_distance(own, old.stages[name], step.mask if text else None)
            values.append(step.mean(distance, self.ids))
        return torch.stack(values).sum()


class FeatureDistillation(MethodCallback):
    """Less-forgetting learning (Jung et al. 2016, eq. 2): 1/2 ||f(x; w) - f(x; w0)||^2 on target rows.

    For models without a head that knows something (a pretrained encoder), and with ``stages`` hint-like for any depth
    (Romero et al. 2015, eq. 3). The teacher is the model the leg starts from, in evaluation mode, on the same
    augmented input. The mean over features, where the paper sums, keeps the weight independent of their number. Padding
    tokens count nowhere. Needs no source data.

    Args:
        weight: factor on the distance.
        stages: names of stages whose outputs are held. Default: the pooled features.
        rows: ``target``, or ``all`` rows of the batch.

    Raises:
        StageError: a stage is unknown, or its output cannot be reached.
    """

    def __init__(self, weight: float = 1.0, stages: list[str] | None = None, rows: Which = "target") -> None:
        super().__init__(weight)
        self.stages, self.rows = tuple(stages or ()), rows

    def build(self, task: Task) -> LossTerm:
        """Copy the backbone as it is now: the leg's start."""
        return OldFeatures(Teacher(task.backbone), ids_of(task, self.rows), self.stages)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without rows to work on."""
        assert isinstance(pl_module, Task)
        refuse_absent(trainer, self.name, ids_of(pl_module, self.rows))
