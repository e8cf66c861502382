"""Step outputs made by hand, to try a loss term on numbers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny import TinyVision
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.tasks import Classification
from crossft.types import Batch, Domain, StepOutput

__all__ = ["built", "make_step", "make_task", "model_of"]


def make_step(
    features: Tensor,
    domains: list[int],
    roles: tuple[str, ...] = ("source", "target"),
    *,
    logits: Tensor | None = None,
    targets: list[int] | None = None,
    quota: tuple[float, ...] | None = None,
    head: str = "photo",
    progress: float = 0.5,
    step: int = 0,
    **more,
) -> StepOutput:
    """A step with these rows; quotas are the rows there are, rows with a target >= 0 are labeled."""
    ids = torch.tensor(domains)
    given = torch.tensor(targets if targets is not None else [-1] * len(ids))
    logits = logits if logits is not None else features
    labeled = given >= 0
    losses = F.cross_entropy(logits, given.clamp(min=0), reduction="none")
    batch = Batch(
        inputs={},
        targets=given,
        labeled=labeled,
        domains=ids,
        sample_ids=torch.arange(len(ids)),
        quota=quota or tuple(float((ids == i).sum()) for i in range(len(roles))),
        labeled_quota=float(labeled.sum()),
        step=step,
    )
    return StepOutput(
        batch=batch,
        features=features,
        logits={head: logits},
        per_sample_loss=torch.where(labeled, losses, torch.zeros_like(losses)),
        progress=progress,
        roles=roles,
        **more,
    )


def model_of(head: nn.Module, key: str = "photo") -> SimpleNamespace:
    """What a term may read of a task, with one head."""
    return SimpleNamespace(heads=nn.ModuleDict({key: head}), head_keys={"photo": key, "sketch": key})


def make_task(
    roles: tuple[str, ...] = ("source", "target"),
    labels: tuple[str, ...] = ("a", "b", "c"),
    backbone: nn.Module | None = None,
    **kwargs,
) -> Classification:
    """A tiny task with one domain a role; the first is ``photo``, the second ``sketch``."""
    names = ("photo", "sketch", "art", "cartoon")
    domains = [Domain(n, r, labels=labels) for n, r in zip(names, roles, strict=False)]
    return Classification(backbone or TinyVision(), domains, **kwargs)


def built(method, task: Classification | None = None, seed: int = 0) -> nn.Module:
    """The method's term on a tiny task, in float64."""
    torch.manual_seed(seed)
    return method.build(task or make_task()).double()
