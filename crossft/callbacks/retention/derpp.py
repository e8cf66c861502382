"""DER++: rehearsed rows keep the outputs they once had (Buzzega et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rehearsal import Keep, Rehearsing, check_memory, chosen_rows, seen_by
from crossft.callbacks.retention.teacher import old_heads
from crossft.errors import ConfigError
from crossft.functional.precision import upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["DERPlusPlus", "DarkMemory"]


class DarkMemory(LossTerm):
    """Mean squared difference of the logits of remembered rows from those the starting model gave them.

    Args:
        head: key of the source's head.
        ids: ids of the source domains.
        size: rows remembered.
        classes: width of the logits.
    """

    trains_source_head = True
    sample_ids: Tensor
    logits: Tensor
    ready: Tensor

    def __init__(self, head: str, ids: tuple[int, ...], size: int, classes: int) -> None:
        super().__init__()
        self.head, self.ids = head, ids
        self.register_buffer("sample_ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("logits", torch.zeros(size, classes))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    constants = ("sample_ids", "logits")

    def fill(self, sample_ids: Tensor, logits: Tensor) -> None:
        """Set what is remembered; ids in any order."""
        order = sample_ids.argsort()
        self.sample_ids.copy_(sample_ids[order])
        self.logits.copy_(logits[order])
        self.ready.fill_(True)

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over the batch's remembered rows of the mean over classes; a scalar."""
        place = torch.searchsorted(self.sample_ids, step.batch.sample_ids).clamp(max=len(self.sample_ids) - 1)
        known = (self.sample_ids[place] == step.batch.sample_ids).unsqueeze(1)
        own = upcast(step.logits[self.head])
        difference = torch.where(known, own - self.logits[place], torch.zeros_like(own))
        return step.mean(difference.square().mean(1), self.ids)


class DERPlusPlus(Rehearsing, MethodCallback):
    """Dark experience replay++ (Buzzega et al. 2020, Dark Experience for General Continual Learning, eq. 6).

    A memory of source rows stands in every batch, as in replay: their labels train (beta is the memory's share of the
    labeled rows in the batch), and their logits are held by a squared difference with weight alpha. The logits
    remembered are those of the model the leg starts from on the plain row; the rows themselves come augmented. The
    paper fills the memory while the stream is learned, and draws two batches from it; here source and target are known
    from the start, and one batch serves both. Needs labeled source rows: as many as ``size``.

    Args:
        weight: alpha (0.1 to 0.5 in the paper's appendix).
        size: rows kept; null keeps all.
        share: of each micro-batch.
        keep: which rows are kept.
        labels: whether their labels train too; false is DER (eq. 5).

    Raises:
        ConfigError: a setting out of range, no labeled source row, or sources without a common head.
    """

    reads_source = "few"

    def __init__(
        self,
        weight: float = 0.5,
        size: int | None = 200,
        share: float = 0.5,
        keep: Keep = "balanced",
        labels: bool = True,
    ) -> None:
        super().__init__(weight)
        check_memory(size, keep)
        if not 0.0 < share < 1.0:
            raise ConfigError(f"share={share} must be between 0 and 1: the part of each batch that is rehearsed")
        self.size, self.share, self.keep, self.labels = size, share, keep, labels

    def build(self, task: Task) -> LossTerm:
        """Choose the memory, at the weights the leg starts from."""
        heads = old_heads(task, self.name)
        if len(heads) != 1:
            raise ConfigError(
                f"methods.{self.name} holds the logits of one head; the source domains have {len(heads)}: "
                "name the same labels for all of them in data.labels"
            )
        data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
        self.remember(data, chosen_rows(task, data, self.name, self.size, self.keep), self.share, self.labels)
        sources = tuple(i for i, d in enumerate(task.domains) if d.role == "source")
        size = sum(map(len, self.rows.values()))
        return DarkMemory(heads[0], sources, size, len(task.domains[sources[0]].labels))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the starting model for the logits, once a run."""
        assert isinstance(pl_module, Task)
        term, data = pl_module.attachments.terms[self.name], trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(term, DarkMemory)
        if bool(term.ready):
            return
        logits = seen_by(pl_module, data, self.rows, lambda batch: pl_module.model_step(batch).logits[term.head])
        term.fill(self.ids[:, 1], logits)
