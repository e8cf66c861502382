"""One pass over some rows outside of training: for importance, memories and statistics of the starting model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from crossft.data.collate import Collate
from crossft.data.dataset import Item
from crossft.data.loader import eval_loaders, place
from crossft.data.module import DomainData
from crossft.data.prepare import first_rows
from crossft.data.sampler import EVALUATION, Key
from crossft.errors import ConfigError
from crossft.types import Batch, LateInputs, Role

__all__ = ["batch_of", "one_pass", "placed", "training_rows"]


def training_rows(
    data: DomainData, role: Role, labeled: bool = False, limit: int | None = None, without: Collection[str] = ()
) -> dict[int, NDArray[np.int64]]:
    """Dataset rows of the training split of every domain with a role, by domain id.

    Args:
        data: prepared data.
        role: ``source``, ``target`` or ``eval``.
        labeled: leave out rows without a label.
        limit: at most so many rows of all these domains together, in proportion to their sizes: a random choice that
            depends on the rows alone, so it is the same in every process and every run.
        without: names of domains to leave out, where others with rows are left.

    Raises:
        ConfigError: there is no such row.
    """
    found: dict[int, NDArray[np.int64]] = {}
    for number, (p, start) in enumerate(zip(data.prepared, first_rows(data.prepared))):
        rows = p.rows("train")
        rows = rows[p.labeled[rows]] if labeled else rows
        if p.domain.role == role and len(rows):
            found[number] = start + rows
    if not found:
        what = "labeled training rows" if labeled else "training rows"
        raise ConfigError(f"a method needs {role} data, and the run has no {what} of that role; set data.{role}")
    others = {n: rows for n, rows in found.items() if data.prepared[n].domain.name not in without}
    found = others or found
    total = sum(map(len, found.values()))
    if limit is not None and limit < total:
        chosen = np.random.default_rng(0).permutation(total)[:limit]
        ends = np.cumsum([0, *map(len, found.values())])
        parts = [np.sort(chosen[(chosen >= a) & (chosen < b)] - a) for a, b in pairwise(ends)]
        found = {n: rows[part] for (n, rows), part in zip(found.items(), parts) if len(part)}
    return found


def one_pass(data: DomainData, rows: dict[int, NDArray[np.int64]], batch_size: int | None = None) -> Iterator[Batch]:
    """Batches of these rows as evaluation sees them (no augmentation), one domain after the other, cut over processes.

    Where there are too few rows for every process, a padding row (domain -1) stands in.

    Args:
        data: bound to a backbone.
        rows: dataset rows by domain id, as from `training_rows`.
        batch_size: rows of a batch. Default: the data's evaluation batch size.
    """
    size = batch_size or data.eval_batch_size
    for loader in eval_loaders(data.dataset, list(rows.items()), size, 0, *place(data.trainer)):
        yield from loader


def batch_of(data: DomainData, rows: Sequence[int], domain: int) -> Batch:
    """These dataset rows of one domain as a batch, as evaluation sees them."""
    items: list[Item] = [data.dataset[Key(int(row), 0, domain, EVALUATION)] for row in rows]
    return Collate(data.dataset.tokens)(items)


def placed(batch: Batch, module: nn.Module) -> Batch:
    """The batch where a module's parameters are, its floating-point inputs in their type (half under ``*-true``)."""
    first = next(module.parameters())
    batch = batch.to(first.device)

    def cast(value: Tensor) -> Tensor:
        return value.to(first.dtype) if value.is_floating_point() else value

    if isinstance(batch.inputs, LateInputs):
        return replace(batch, inputs=batch.inputs.mapped(cast))
    return replace(batch, inputs={k: cast(v) for k, v in batch.inputs.items()})
