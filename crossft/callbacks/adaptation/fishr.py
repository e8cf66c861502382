"""Fishr: equal variances of gradients over source domains (Rame et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossft.callbacks.adaptation.risks import labeled_rows
from crossft.callbacks.adaptation.roles import Ids, shared_head, source_groups
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import full_precision, gradient_variance, logit_gradients, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["Fishr", "GradientVariances"]


class GradientVariances(LossTerm):
    """Mean over source domains of the mean squared distance of their gradient variance to the average one.

    The gradient is that of each row's loss by weight and bias of the head. A running average smooths each domain's
    variance; only this batch's part has a gradient, and the average is divided by 1 - ema so that its size does not
    depend on ema (as in the published code). Rows of all processes form one batch; under gradient accumulation each
    micro-batch is a batch of its own, and the running average takes in their mean.

    Args:
        groups: ids of the source domains.
        head: key of their head.
        entries: parameters of the head, k * d + k.
        ema: decay of the running average, an optimizer step.
        anneal: share of training over which the term is 0.
    """

    average: Tensor
    sums: Tensor
    count: Tensor
    clock: Tensor

    def __init__(self, groups: Ids, head: str, entries: int, ema: float, anneal: float) -> None:
        super().__init__()
        self.groups, self.head, self.ema, self.anneal = groups, head, ema, anneal
        self.register_buffer("average", torch.zeros(len(groups), entries))
        self.register_buffer("sums", torch.zeros(len(groups), entries))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("clock", torch.tensor(-1))

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The distance, a scalar."""
        gradients = logit_gradients(step.per_sample_loss, step.logits[self.head])
        rows = labeled_rows(step, self.groups, upcast(gradients), upcast(step.features))
        with full_precision(gradients):
            variances = torch.stack(
                [gradient_variance(g, h) if len(g) else (g.sum() + h.sum()) * self.average[0] for g, h in rows]
            )
        self._take_in(step.batch.step, variances.detach())
        smoothed = variances + self.ema / (1 - self.ema) * self.average.to(variances.dtype)
        distance = (smoothed - smoothed.mean(0)).square().mean()
        return distance * float(step.progress >= self.anneal)

    @torch.no_grad()
    def _take_in(self, number: int, variances: Tensor) -> None:
        """Let the running average follow when a new optimizer step begins, then add this micro-batch."""
        if number != int(self.clock):
            if int(self.count) > 0:
                self.average.lerp_(self.sums / self.count, 1 - self.ema)
            self.sums.zero_()
            self.count.zero_()
            self.clock.fill_(number)
        self.sums += variances.to(self.sums.dtype)
        self.count += 1


class Fishr(MethodCallback):
    """Fishr (Rame et al. 2022, Invariant Gradient Variances for Out-of-Distribution Generalization, section 3).

    Objective: mean of the source risks + lambda * the term. The head is linear, so the gradient of a row is an outer
    product and its variance over rows has a closed form: no per-row gradients and no change to any module are needed
    (the published code takes them from BackPACK). The task loss is the mean of the risks where every source has the
    same quota of a batch (``data.sampler: domain``) and only sources have labels. The published code makes a new
    optimizer when the term sets in; the optimizer stays here.

    Args:
        weight: lambda (1000 in the published code).
        ema: decay of the running variances (0.95 in the published code).
        anneal: share of training over which the term is 0 (0.3: 1500 of 5000 steps in the published code).

    Raises:
        ConfigError: an argument out of range, fewer than two source domains or several label spaces among them, or a
            head that is not one linear layer without dropout.
    """

    needs_source = "labeled"

    def __init__(self, weight: float = 1000.0, ema: float = 0.95, anneal: float = 0.3) -> None:
        super().__init__(weight)
        if not 0 <= ema < 1 or not 0 <= anneal <= 1:
            raise ConfigError(f"ema={ema} must be in [0, 1), anneal={anneal} in [0, 1]")
        self.ema, self.anneal = ema, anneal

    def build(self, task: Task) -> LossTerm:
        """Check the head, and make room for the running variances."""
        who = f"methods.{self.name}"
        groups = source_groups(task, who)
        head = shared_head(task, who, ("source",))
        layers = [m for m in task.heads[head].modules() if not isinstance(m, nn.Sequential)]
        linear = [m for m in layers if isinstance(m, nn.Linear)]
        dropped = [m for m in layers if isinstance(m, nn.Dropout) and m.p > 0]
        if len(linear) != 1 or linear[0].bias is None or dropped or len(layers) - len(linear) > 1:
            raise ConfigError(f"{who} needs a head that is one linear layer without dropout; set model.head_dropout=0")
        return GradientVariances(groups, head, linear[0].weight.numel() + linear[0].bias.numel(), self.ema, self.anneal)
