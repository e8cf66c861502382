"""Risks of source domains, and what methods of domain generalization read of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from crossft.callbacks.adaptation.pairs import whole_batch
from crossft.callbacks.adaptation.roles import Ids
from crossft.types import HasBackbone, StepOutput

__all__ = ["domain_risks", "early_factor", "labeled_rows", "source_logits"]


def domain_risks(step: StepOutput, groups: Ids) -> Tensor:
    """[g] mean task loss of each domain's rows on this process; the mean over processes and micro-batches is exact."""
    return torch.stack([step.mean(step.per_sample_loss, (g,)) for g in groups])


def source_logits(step: StepOutput, model: HasBackbone, groups: Ids) -> list[Tensor]:
    """Logits [b, k] of each head that these domains use."""
    keys = dict.fromkeys(model.head_keys[model.domains[g].name] for g in groups)
    return [step.logits[key] for key in keys]


def labeled_rows(step: StepOutput, groups: Ids, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Labeled rows of each group over all processes: for each group the rows of each value."""
    domains, labeled, *gathered = whole_batch(step, step.batch.labeled.long(), *values)
    masks = [(domains == g) & (labeled == 1) for g in groups]
    return [tuple(v[mask] for v in gathered) for mask in masks]


def early_factor(weight: float, anneal: float, progress: float) -> float:
    """Factor on a penalty whose weight, where above 1, is 1 over the first ``anneal`` of training."""
    return 1.0 / weight if progress < anneal and weight > 1 else 1.0
