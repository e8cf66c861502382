"""L2-SP: stay near the starting point (Li, Grandvalet & Davoine 2018)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.sharding import refuse_sharded
from crossft.functional.pull import add_pull_
from crossft.tasks import Task
from crossft.types import WeightPenalty

__all__ = ["L2SP", "L2SPPenalty"]


class L2SPPenalty(WeightPenalty):
    """alpha/2 ||w_S - w_S^0||^2 + beta/2 ||w_H||^2 (Li et al. 2018, eq. 2), outside the autograd graph.

    ``value`` is the bracket for alpha = 1: 1/2 ||w_S - w_S^0||^2 + (beta/alpha)/2 ||w_H||^2; the weight is alpha.

    Args:
        shared: parameters with a starting point (w_S): the backbone's.
        own: parameters without one (w_H): the heads'.
        ratio: beta / alpha.
    """

    def __init__(self, shared: list[nn.Parameter], own: list[nn.Parameter], ratio: float) -> None:
        super().__init__()
        self._shared, self._own, self.ratio = shared, own, ratio
        for i, parameter in enumerate(shared):
            self.register_buffer(f"anchor_{i}", parameter.detach().clone())

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers that never change during a run."""
        return tuple(name for name, _ in self.named_buffers())

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(p, a) for p, a in zip(self._shared, self.buffers(), strict=True) if p.requires_grad]
        return [p for p, _ in pairs], [a for _, a in pairs]

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty at alpha = 1, a scalar in float32."""
        weights, anchors = self._pairs()
        terms = [0.5 * (w.float() - a.float()).square().sum() for w, a in zip(weights, anchors, strict=True)]
        terms += [0.5 * self.ratio * p.float().square().sum() for p in self._own if p.requires_grad]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def add_grad_(self, weight: float) -> None:
        """Add alpha (w - w0) to the backbone's gradients and beta w to the heads'."""
        if weight == 0.0:
            return
        weights, anchors = self._pairs()
        add_pull_([_grad(p) for p in weights], weights, anchors, weight)
        own = [p for p in self._own if p.requires_grad]
        if own and self.ratio:
            torch._foreach_add_([_grad(p) for p in own], own, alpha=weight * self.ratio)  # type: ignore[arg-type]


def _grad(parameter: nn.Parameter | Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class L2SP(MethodCallback):
    """L2-SP (Li, Grandvalet & Davoine 2018, Explicit Inductive Bias for Transfer Learning, eq. 2).

    Args:
        weight: alpha, on the distance to the starting weights (default 0.1, the paper's best on most of its sets).
        head_ratio: beta / alpha, plain decay of the heads (the paper fixes beta = 0.01, so 0.1 at alpha = 0.1).

    Raises:
        ConfigError: a strategy that cuts weights into pieces.
    """

    def __init__(self, weight: float = 0.1, head_ratio: float = 0.1) -> None:
        super().__init__(weight)
        self.head_ratio = head_ratio

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then attach."""
        if stage == "fit":
            refuse_sharded(trainer, self.name)
        super().setup(trainer, pl_module, stage)

    def build(self, task: Task) -> WeightPenalty:
        """Anchor the backbone at its weights of now: those the leg starts from; what a head shares is the head's."""
        heads = list(task.heads.parameters())
        own = {id(p) for p in heads}
        return L2SPPenalty([p for p in task.backbone.parameters() if id(p) not in own], heads, self.head_ratio)
