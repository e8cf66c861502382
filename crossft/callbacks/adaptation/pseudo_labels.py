"""Pseudo-labels: target rows learn their own sure predictions (Lee 2013)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from crossft.callbacks.adaptation.roles import Ids, ids_of, shared_head
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["PseudoLabelLoss", "PseudoLabels"]


class PseudoLabelLoss(LossTerm):
    """Cross-entropy of unlabeled target rows with their own predicted class, where it is sure enough.

    The mean runs over all target rows; a row below its threshold, or with a label, counts as 0. Running means of the
    predictions are of whole optimizer steps and of all processes; they take a step's rows in when the next one begins,
    so that all micro-batches of a step see the same thresholds.

    Args:
        targets: ids of the target domains.
        head: key of their head.
        classes: number of classes.
        threshold: least confidence, or ``adaptive`` for the running mean confidence.
        balance: scale each class's threshold by how often the class is predicted.
        momentum: of the running means.
        ramp: share of training over which the loss grows from 0 to its full size.
    """

    confidence: Tensor
    marginal: Tensor
    sums: Tensor
    clock: Tensor

    def __init__(
        self,
        targets: Ids,
        head: str,
        classes: int,
        threshold: float | Literal["adaptive"],
        balance: bool,
        momentum: float,
        ramp: float,
    ) -> None:
        super().__init__()
        self.targets, self.head = targets, head
        self.threshold, self.balance, self.momentum, self.ramp = threshold, balance, momentum, ramp
        self.register_buffer("confidence", torch.tensor(1.0 / classes))
        self.register_buffer("marginal", torch.full((classes,), 1.0 / classes))
        self.register_buffer("sums", torch.zeros(classes + 2))  # of one step: probabilities, confidence, rows
        self.register_buffer("clock", torch.tensor(-1))
        self._last: dict[str, Tensor] = {}

    @property
    def tracks(self) -> bool:
        """Whether thresholds follow the running means."""
        return self.balance or self.threshold == "adaptive"

    def thresholds(self) -> Tensor:
        """Least confidence of each class, [k]."""
        base = self.confidence if self.threshold == "adaptive" else self.marginal.new_tensor(self.threshold)
        scale = self.marginal / self.marginal.max() if self.balance else torch.ones_like(self.marginal)
        return base * scale

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The mean masked cross-entropy, a scalar."""
        logits = upcast(step.logits[self.head])
        rows = step.rows(self.targets) & ~step.batch.labeled
        confidence, labels = F.softmax(logits.detach(), 1).max(1)
        if self.tracks:
            self._track(step, F.softmax(logits.detach(), 1), rows)
        kept = rows & (confidence >= self.thresholds()[labels])
        losses = torch.where(kept, F.cross_entropy(logits, labels, reduction="none"), torch.zeros_like(confidence))
        self._last = {"kept": step.mean(kept.to(logits.dtype), self.targets)}
        return self._strength(step.progress) * step.mean(losses, self.targets)

    def _strength(self, progress: float) -> float:
        return min(1.0, progress / self.ramp) if self.ramp > 0 else 1.0

    @torch.no_grad()
    def _track(self, step: StepOutput, p: Tensor, rows: Tensor) -> None:
        """Take in the last step's rows when a new one begins, then add this micro-batch's."""
        if step.batch.step != int(self.clock):
            if self.sums[-1] > 0:
                means = self.sums[:-1] / self.sums[-1]
                self.marginal.lerp_(means[:-1], 1 - self.momentum)
                self.confidence.lerp_(means[-1], 1 - self.momentum)
            self.sums.zero_()
            self.clock.fill_(step.batch.step)
        kept = p[rows]
        added = torch.cat([kept.sum(0), kept.amax(1).sum()[None], rows.sum()[None].to(p.dtype)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(added)
        self.sums += added.to(self.sums.dtype)

    def logs(self) -> dict[str, Tensor]:
        """Share of the target rows that learn."""
        return self._last


class PseudoLabels(MethodCallback):
    """Pseudo-labels (Lee 2013), with a threshold as in FixMatch, or adaptive ones a class as in FreeMatch.

    Lee 2013 (eq. 15): cross-entropy of unlabeled rows with their own most likely class. ``threshold``: only where its
    probability is high (0.95 in Sohn et al. 2020, FixMatch). ``adaptive``: the running mean confidence of the target
    rows; ``balance``: times the class's share of the running mean prediction over that of the most frequent class, so
    rarely predicted classes are not left out (Wang et al. 2023, FreeMatch, self-adaptive thresholding, whose running
    means include the current batch; here they end with the last optimizer step, the same for all its micro-batches).
    There is one view of each row: no weak and strong augmentation.

    Args:
        weight: factor on the loss (1 in FixMatch).
        threshold: least confidence in [0, 1), 0 for all rows; or ``adaptive``.
        balance: thresholds a class.
        momentum: of the running means, an optimizer step (0.999 in FreeMatch, whose training is long; lower it for
            hundreds of steps).
        ramp: share of training over which the loss grows linearly from 0 (Lee 2013, eq. 16); 0: none.

    Raises:
        ConfigError: an argument out of range, or targets with different label spaces.
    """

    needs_target = "unlabeled"

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float | Literal["adaptive"] = 0.95,
        balance: bool = False,
        momentum: float = 0.999,
        ramp: float = 0.0,
    ) -> None:
        super().__init__(weight)
        if threshold != "adaptive" and not (isinstance(threshold, float | int) and 0 <= threshold < 1):
            raise ConfigError(f"threshold={threshold!r} must be in [0, 1), or 'adaptive'")
        if not 0 <= momentum < 1 or not 0 <= ramp <= 1:
            raise ConfigError(f"momentum={momentum} must be in [0, 1), ramp={ramp} in [0, 1]")
        self.threshold, self.balance, self.momentum, self.ramp = threshold, balance, momentum, ramp

    def build(self, task: Task) -> LossTerm:
        """Find the targets and their head."""
        head = shared_head(task, f"methods.{self.name}", ("target",))
        classes = next(len(d.labels) for d in task.domains if task.head_keys[d.name] == head)
        return PseudoLabelLoss(
            ids_of(task, "target"), head, classes, self.threshold, self.balance, self.momentum, self.ramp
        )
