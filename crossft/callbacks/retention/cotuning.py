"""Co-Tuning: the source's head learns along, from target labels translated into source labels (You et al. 2020)."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rehearsal import seen_by
from crossft.callbacks.retention.rows import ids_of, refuse_absent
from crossft.callbacks.retention.teacher import old_heads
from crossft.data.passes import training_rows
from crossft.errors import ConfigError
from crossft.functional.precision import upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["CoTuning", "TranslatedLabels", "relation"]


class TranslatedLabels(LossTerm):
    """Cross-entropy of the source head's prediction against p(source label | target label).

    Args:
        head: key of the source's head.
        ids: ids of the target domains.
        classes: numbers of target and source labels.
        train_head: whether the source's head trains.
    """

    constants = ("relation",)
    relation: Tensor
    ready: Tensor

    def __init__(self, head: str, ids: tuple[int, ...], classes: tuple[int, int], train_head: bool = True) -> None:
        super().__init__()
        self.trains_source_head = train_head
        self.head, self.ids = head, ids
        self.register_buffer("relation", torch.full(classes, 1.0 / classes[1]))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Sum over labeled target rows, divided like the task loss; a scalar."""
        rows = step.rows(self.ids) & step.batch.labeled
        labels = torch.where(rows, step.batch.targets, torch.zeros_like(step.batch.targets))
        log_p = upcast(step.logits[self.head]).log_softmax(1)
        losses = -(self.relation[labels.clamp(max=len(self.relation) - 1)] * log_p).sum(1)
        return torch.where(rows, losses, torch.zeros_like(losses)).sum() / max(step.batch.labeled_quota, 1e-12)


class CoTuning(MethodCallback):
    """Co-Tuning for transfer learning (You et al. 2020, eq. 4, relation by the direct approach of section 3.2).

    Before training, the starting model's source head predicts the labeled target rows: the mean prediction over the
    rows of target label y is p(source label | y). While the target is learned, the source's head goes on learning from
    these translated labels, so it stays in use instead of being thrown away. For a source and a target with different
    label spaces. Needs no source data: the target's labels and the source's head.

    Args:
        weight: lambda (2.3 in the released code).
        temperature: divides the source head's logits when the relation is made (the paper calibrates it on source
            validation data; 1 takes the logits as they are).

    Raises:
        ConfigError: shared labels, several label spaces on a side, or labels that are no classes.
    """

    def __init__(self, weight: float = 2.3, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if temperature <= 0.0:
            raise ConfigError(f"temperature={temperature} must be positive; 1 takes the logits as they are")
        self.temperature = temperature

    def build(self, task: Task) -> LossTerm:
        """Find the two heads."""
        old = old_heads(task, self.name)
        targets = [(i, d) for i, d in enumerate(task.domains) if d.role == "target"]
        new = {task.head_keys[d.name] for _, d in targets}
        if len(old) != 1 or len(new) != 1 or old[0] in new:
            raise ConfigError(
                f"methods.{self.name} translates one target label space into another one of the source; here the heads "
                f"are {old} and {sorted(new)}: for a shared label space use crossft.callbacks.retention.LwF"
            )
        source = next(d for d in task.domains if task.head_keys[d.name] == old[0])
        if {source.kind, targets[0][1].kind} != {"multiclass"}:
            raise ConfigError(f"methods.{self.name} translates classes; the labels are {targets[0][1].kind}")
        sizes = (len(targets[0][1].labels), len(source.labels))
        return TranslatedLabels(old[0], ids_of(task, "target"), sizes, self.weight > 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the starting model for the relation, once a run."""
        assert isinstance(pl_module, Task)
        refuse_absent(trainer, self.name, ids_of(pl_module, "target"))
        term, data = pl_module.attachments.terms[self.name], trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(term, TranslatedLabels)
        if bool(term.ready):
            return
        rows = training_rows(data, "target", labeled=True)
        logits = seen_by(pl_module, data, rows, lambda batch: pl_module.model_step(batch).logits[term.head])
        labels = torch.tensor(np.array([int(data.dataset.targets[r]) for own in rows.values() for r in own]))
        term.relation.copy_(relation(logits / self.temperature, labels, len(term.relation)))
        term.ready.fill_(True)


def relation(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """p(source label | target label): the mean softmax over each target label's rows (You et al. 2020, section 3.2).

    Args:
        logits: [n, k_s] of the source's head.
        labels: [n] target labels.
        classes: number of target labels; one without a row gets the uniform distribution.

    Returns:
        [classes, k_s], rows add up to 1.
    """
    p = logits.softmax(1)
    sums = torch.zeros(classes, p.shape[1]).index_add_(0, labels, p)
    counts = torch.bincount(labels, minlength=classes).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.full_like(sums, 1.0 / p.shape[1]))
