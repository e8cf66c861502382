"""AFN: adaptive feature norms, hard and stepwise (Xu et al. 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crossft.callbacks.adaptation.pairs import members, whole_batch
from crossft.callbacks.adaptation.roles import Ids, ids_of
from crossft.callbacks.base import MethodCallback
from crossft.errors import ConfigError
from crossft.functional import stepwise_norm, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, StepOutput

__all__ = ["AFN", "HardNorm", "StepwiseNorm"]


class StepwiseNorm(LossTerm):
    """SAFN: every row's feature norm grows by a step, source and target alike (Xu et al. 2019, eq. 9).

    Args:
        groups: domain ids of the source and of the target.
        step: Delta r.
    """

    def __init__(self, groups: list[Ids], step: float) -> None:
        super().__init__()
        self.groups, self.step = groups, step
        self._last: dict[str, Tensor] = {}

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Sum over groups of the mean squared difference to the larger norm; a scalar (its value is constant)."""
        features = upcast(step.features)
        values = stepwise_norm(features, self.step)
        norms = torch.linalg.vector_norm(features.detach(), dim=1)
        self._last = _logged([step.mean(norms, ids) for ids in self.groups])
        return torch.stack([step.mean(values, ids) for ids in self.groups]).sum()

    def logs(self) -> dict[str, Tensor]:
        """Mean feature norm of source and target rows."""
        return self._last


class HardNorm(LossTerm):
    """HAFN: the mean feature norms of source and target go to one radius R (Xu et al. 2019, eq. 7).

    Norms of all processes' rows are averaged together; under gradient accumulation each micro-batch by itself.

    Args:
        groups: domain ids of the source and of the target.
        radius: R.
    """

    def __init__(self, groups: list[Ids], radius: float) -> None:
        super().__init__()
        self.groups, self.radius = groups, radius
        self._last: dict[str, Tensor] = {}

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """Sum over groups of the squared difference of mean norm and radius; a scalar."""
        domains, norms = whole_batch(step, torch.linalg.vector_norm(upcast(step.features), dim=1))
        loss = norms.sum() * 0.0
        means = []
        for ids in self.groups:
            rows = members(domains, ids)
            count = rows.sum()
            mean = torch.where(rows, norms, torch.zeros_like(norms)).sum() / count.clamp(min=1)
            loss = loss + torch.where(count > 0, (mean - self.radius).square(), torch.zeros_like(mean))
            means.append(mean.detach())
        self._last = _logged(means)
        return loss

    def logs(self) -> dict[str, Tensor]:
        """Mean feature norm of source and target rows."""
        return self._last


def _logged(means: list[Tensor]) -> dict[str, Tensor]:
    return {"norm_source": means[0], "norm_target": means[1]}


class AFN(MethodCallback):
    """AFN (Xu et al. 2019, Larger Norm More Transferable, eq. 7 and 9), on the features that the head reads.

    The paper puts it on a bottleneck layer behind the backbone; here there is none.

    Args:
        weight: lambda (0.05 in the paper).
        variant: ``stepwise`` (SAFN) or ``hard`` (HAFN).
        step: Delta r of SAFN (1 in the paper, 0.3 for VisDA).
        radius: R of HAFN (25 in the paper).

    Raises:
        ConfigError: an argument out of range.
    """

    needs_source = "unlabeled"
    needs_target = "unlabeled"

    def __init__(
        self,
        weight: float = 0.05,
        variant: Literal["stepwise", "hard"] = "stepwise",
        step: float = 1.0,
        radius: float = 25.0,
    ) -> None:
        super().__init__(weight)
        if variant not in ("stepwise", "hard"):
            raise ConfigError(f"variant={variant!r} is unknown; allowed: stepwise, hard")
        if step <= 0 or radius <= 0:
            raise ConfigError(f"step={step}, radius={radius}: both must be positive")
        self.variant, self.step, self.radius = variant, step, radius

    def build(self, task: Task) -> LossTerm:
        """Find source and target."""
        groups = [ids_of(task, "source"), ids_of(task, "target")]
        return StepwiseNorm(groups, self.step) if self.variant == "stepwise" else HardNorm(groups, self.radius)
