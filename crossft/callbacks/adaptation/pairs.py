"""The term that discrepancy methods share: a distance between two groups of domains, on gathered rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crossft.callbacks.adaptation.features import Layer, layer_of
from crossft.callbacks.adaptation.roles import Between, Ids, Pair, check_between, domain_pairs, shared_head
from crossft.errors import ConfigError
from crossft.functional import full_precision, gather_rows, upcast
from crossft.tasks import Task
from crossft.types import HasBackbone, LossTerm, Role, StepOutput

__all__ = ["Distance", "PairDistance", "check_pairs", "members", "pair_distance", "whole_batch"]

Distance = Callable[[list[Tensor], list[Tensor]], Tensor]
"""From the layers [m, d_l] of one group and the layers [n, d_l] of the other to a scalar."""


def whole_batch(step: StepOutput, *values: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, ordered by sample id, so that the order does not depend on the processes.

    Args:
        step: the step; its domain ids are gathered too.
        *values: [b, ...] each.

    Returns:
        Domain ids [B], then each value [B, ...]; float16 and bfloat16 as float32.
    """
    gathered = gather_rows(step.batch.sample_ids, step.batch.domains, *(upcast(v) for v in values))
    order = torch.argsort(gathered[0], stable=True)
    return tuple(v[order] for v in gathered[1:])


def members(domains: Tensor, ids: Ids) -> Tensor:
    """[B] bool: rows of these domains; a padding row is of none."""
    return torch.isin(domains, torch.tensor(ids, device=domains.device))


class PairDistance(LossTerm):
    """Mean over pairs of domain groups of their distance.

    The rows of all processes are gathered with gradients, since such a statistic is not an average of shards. Under
    gradient accumulation every micro-batch is a batch of its own: the term depends on its size.

    Args:
        pairs: the pairs of groups of domain ids.
        layers: where the distance is taken.
        distance: the distance of two groups.
    """

    def __init__(self, pairs: list[Pair], layers: list[Layer], distance: Distance) -> None:
        super().__init__()
        self.pairs, self.layers, self.distance = pairs, layers, distance
        self.needs_stages = tuple(stage for layer in layers for stage in layer.stage)

    def forward(self, step: StepOutput, model: HasBackbone) -> Tensor:
        """The mean distance, a scalar; a pair without rows on one side counts as 0."""
        domains, *values = whole_batch(step, *(layer.rows(step) for layer in self.layers))
        total = torch.stack([v.sum() * 0.0 for v in values]).sum()
        for first, second in self.pairs:
            a, b = members(domains, first), members(domains, second)
            with full_precision(total):
                distance = self.distance([v[a] for v in values], [v[b] for v in values])
            total = total + distance / len(self.pairs)
        return total


def check_pairs(layers: Sequence[str], between: str) -> None:
    """Refuse an empty list of layers and an unknown ``between``.

    Raises:
        ConfigError: either.
    """
    check_between(between)
    if not layers:
        raise ConfigError("layers=() is empty; name at least one, for example features")


def pair_distance(task: Task, name: str, layers: Sequence[str], between: Between, distance: Distance) -> PairDistance:
    """Resolve the names of layers and the pairs of domains on a task.

    Args:
        task: the task.
        name: the method's name, for messages.
        layers: names of layers.
        between: which domains are compared.
        distance: the distance of two groups.

    Raises:
        ConfigError: the compared domains have different heads though their logits are read, or there are too few.
        StageError: a layer that is none.
    """
    roles: tuple[Role, ...] = ("source",) if between == "sources" else ("source", "target")
    reads_head = not {"logits", "probabilities"}.isdisjoint(layers)
    head = shared_head(task, f"methods.{name}", roles) if reads_head else ""
    return PairDistance(domain_pairs(task, between), [layer_of(task, n, head) for n in layers], distance)
