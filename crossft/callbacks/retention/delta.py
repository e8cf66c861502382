"""DELTA: feature maps stay, channel by channel as the target needs them (Li et al. 2019)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist

from crossft.backbones.batchnorm import set_domains
from crossft.callbacks.base import MethodCallback
from crossft.callbacks.retention.rows import ids_of, refuse_absent
from crossft.callbacks.retention.teacher import Teacher, TeacherTerm
from crossft.data.passes import one_pass, placed, training_rows
from crossft.errors import ConfigError
from crossft.functional.modes import evaluating
from crossft.functional.precision import upcast
from crossft.tasks import Task
from crossft.types import Batch, HasBackbone, LossTerm, StepOutput

__all__ = ["DELTA", "ChannelDistance", "channel_attention", "channels_last", "without_channel"]


def channels_last(value: Tensor) -> Tensor:
    """A stage's output as [b, positions, channels]: maps [b, c, h, w], tokens [b, n, d] or vectors [b, d]."""
    if value.ndim == 4:
        return value.flatten(2).transpose(1, 2)
    return value if value.ndim == 3 else value.unsqueeze(1)


def without_channel(value: Tensor, channel: int) -> Tensor:
    """The stage's output with one channel set to zero."""
    out = value.clone()
    if value.ndim == 4:
        out[:, channel] = 0.0
    else:
        out[..., channel] = 0.0
    return out


class ChannelDistance(TeacherTerm):
    """1/2 sum over channels of attention times the mean squared difference over positions, summed over stages.

    Args:
        teacher: the starting model.
        ids: ids of the target domains.
        stages: names of the stages.
    """

    ready: Tensor

    def __init__(self, teacher: Teacher, ids: tuple[int, ...], stages: tuple[str, ...], widths: list[int]) -> None:
        super().__init__(teacher)
        self.ids, self.needs_stages = ids, stages
        for i, width in enumerate(widths):
            self.register_buffer(f"attention_{i}", torch.ones(width))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the tensors that never change during a run."""
        return tuple(k for k in self.state_dict() if k.startswith(("teacher.", "attention_")))

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Mean over target rows; a scalar."""
        old = self.teacher(step.batch, model, capture=self.needs_stages).stages
        values = []
        for i, name in enumerate(self.needs_stages):
            own, before = channels_last(upcast(step.stages[name])), channels_last(upcast(old[name]))
            square = (own - before).square()
            if step.mask is not None and square.shape[:2] == step.mask.shape:
                weights = step.mask.to(square).unsqueeze(2)
                square = (square * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            else:
                square = square.mean(1)
            values.append(step.mean(0.5 * (square * self.get_buffer(f"attention_{i}")).sum(1), self.ids))
        return torch.stack(values).sum()


class DELTA(MethodCallback):
    """DELTA (Li et al. 2019, Deep Learning Transfer using Feature Map with Attention, eq. 4-7).

    The outputs of some stages on target rows are held near the starting model's, channel by channel. A channel's
    attention is the softmax over channels of how much the loss on target rows rises when that channel of the starting
    model is set to zero, times the number of channels: those the target can use are held, the others are free to change
    (their "unactivated channel re-usage"). It is found once, before training, on labeled target rows under the starting
    model's own head: a label space the starting model does not know has no such head yet, so take ``uniform`` there.
    The paper's decay of the head is the optimizer's ``weight_decay``. Needs no source data.

    Against the released code the value is a mean over rows, not a sum, so the weight does not depend on the batch size.

    Args:
        weight: alpha (0.01 with the sum over a batch of 64 in the paper; the mean makes that about 0.6).
        stages: names of the stages held. Default: the last one but one.
        attention: ``exact`` (one pass a channel from the stage on) or ``uniform`` (all ones).
        samples: labeled target rows that attention is measured on.

    Raises:
        ConfigError: no labeled target row, or ``samples`` below 1.
        StageError: a stage is unknown, or the backbone cannot start after it.
    """

    def __init__(
        self,
        weight: float = 0.5,
        stages: list[str] | None = None,
        attention: Literal["exact", "uniform"] = "exact",
        samples: int = 32,
    ) -> None:
        super().__init__(weight)
        if samples < 1:
            raise ConfigError(f"samples={samples} must be at least 1: the rows that attention is measured on")
        if attention not in ("exact", "uniform"):
            raise ConfigError(f"attention={attention!r} is unknown; allowed: exact, uniform")
        self.stages, self.attention, self.samples = stages, attention, samples

    def build(self, task: Task) -> LossTerm:
        """Copy the starting model."""
        names = [s.name for s in task.backbone.stages]
        stages = tuple(self.stages or names[-2:-1] or names)
        data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
        rows = training_rows(data, "target", labeled=self.attention == "exact", limit=1)
        with evaluating(task), torch.no_grad():
            batch = placed(next(one_pass(data, rows)), task.backbone)
            set_domains(task.backbone, batch.domains)
            shown = task.backbone(batch.inputs, capture=stages).stages
            for name in stages if self.attention == "exact" else ():
                task.backbone.forward_from(_after(names, name, self.name), shown[name], batch.inputs)
        widths = [channels_last(shown[name]).shape[2] for name in stages]
        return ChannelDistance(Teacher(task.backbone), ids_of(task, "target"), stages, widths)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the attention at the starting weights, once a run."""
        assert isinstance(pl_module, Task)
        refuse_absent(trainer, self.name, ids_of(pl_module, "target"))
        term = pl_module.attachments.terms[self.name]
        assert isinstance(term, ChannelDistance)
        if self.attention == "exact" and not bool(term.ready):
            rows = training_rows(trainer.datamodule, "target", labeled=True, limit=self.samples)  # type: ignore[attr-defined]
            batches = [placed(b, pl_module.backbone) for b in one_pass(trainer.datamodule, rows)]  # type: ignore[attr-defined]
            for i, name in enumerate(term.needs_stages):
                buffer = term.get_buffer(f"attention_{i}")
                buffer.copy_(channel_attention(pl_module, batches, name, len(buffer)))
        term.ready.fill_(True)


def _after(names: list[str], stage: str, method: str) -> str:
    """The stage after a stage.

    Raises:
        ConfigError: there is none.
    """
    index = names.index(stage) + 1
    if index == len(names):
        raise ConfigError(
            f"methods.{method}: attention of {stage!r} needs a stage after it, and it is the last; choose an earlier "
            "one or attention=uniform"
        )
    return names[index]


@torch.no_grad()
def channel_attention(task: Task, batches: list[Batch], stage: str, channels: int) -> Tensor:
    """channels * softmax over channels of the rise of the mean loss without that channel (Li et al. 2019, eq. 7).

    Args:
        task: the starting model, with the heads that know the rows' labels.
        batches: labeled rows of this process.
        stage: the stage whose output is masked.
        channels: of its output.

    Returns:
        [channels], mean 1, the same on every process.
    """
    following = _after([s.name for s in task.backbone.stages], stage, "delta")
    rise = torch.zeros(channels + 1, dtype=torch.float64, device=task.device)
    with evaluating(task):
        for batch in batches:
            set_domains(task.backbone, batch.domains)
            value = task.backbone(batch.inputs, capture=(stage,)).stages[stage]
            for channel in range(-1, channels):
                masked = value if channel < 0 else without_channel(value, channel)
                features = task.backbone.forward_from(following, masked, batch.inputs).features
                rise[channel] += _loss(task, features, batch)
    count = torch.tensor(sum(int(b.labeled.sum()) for b in batches), dtype=torch.float64, device=task.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(rise)
        dist.all_reduce(count)
    losses = rise[:channels] / count
    return (channels * (losses - rise[-1] / count).softmax(0)).float()


def _loss(task: Task, features: Tensor, batch: Batch) -> Tensor:
    """Sum of the task loss over the batch's labeled rows."""
    domain = task.domains[int(batch.domains.max())]
    logits = task.heads[task.head_keys[domain.name]](features)
    return task.per_sample_loss(logits, batch.targets, batch.labeled, domain).double().sum()
