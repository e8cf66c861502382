"""What the methods with a memory of the source share: which rows they keep, what the starting model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from crossft.callbacks.retention.chain import leave_memory, still_remembered
from crossft.data.memory import Memory
from crossft.data.passes import one_pass, placed, training_rows
from crossft.errors import ConfigError
from crossft.functional.memory import balanced, herding, reservoir
from crossft.functional.modes import evaluating
from crossft.tasks import Task
from crossft.types import Batch

__all__ = ["Keep", "Rehearsing", "check_memory", "chosen_rows", "ids_of_rows", "rows_of", "seen_by"]

Keep = Literal["balanced", "reservoir", "herding"]
"""``balanced``: as many of each class, at random; ``reservoir``: at random; ``herding``: those nearest their class's
mean feature under the starting model."""

Rows = dict[int, NDArray[np.int64]]


def check_memory(size: int | None, keep: str) -> None:
    """Check the arguments of a memory.

    Raises:
        ConfigError: the size is below 1, or the choice unknown.
    """
    if size is not None and size < 1:
        raise ConfigError(f"size={size} must be at least 1; null keeps every source row")
    if keep not in get_args(Keep):
        raise ConfigError(f"keep={keep!r} is unknown; allowed: {', '.join(get_args(Keep))}")


def chosen_rows(task: Task, data: Any, name: str, size: int | None, keep: Keep) -> Rows:
    """Dataset rows of a memory over the source's labeled training rows, by domain id.

    Every source domain has a part in proportion to its size. The choice depends on the rows (and for ``herding`` the
    starting model) alone: it is the same on every process, and for every seed. Of a domain that the memory of the run
    before held (under the same name) only what that one kept can be chosen: it shrinks to make room for new domains.

    Raises:
        ConfigError: no labeled source row, or classes are needed and the labels are no classes.
    """
    rows = training_rows(data, "source", labeled=True)
    sizes = {number: len(own) for number, own in rows.items()}
    total = sum(sizes.values())
    rows = still_remembered(task, data, name, rows)
    if size is None or size >= total:
        return rows
    found: Rows = {}
    for number, own in rows.items():
        part = min(len(own), max(1, round(size * sizes[number] / total)))
        if keep == "reservoir":
            found[number] = own[reservoir(len(own), part)]
            continue
        domain = task.domains[number]
        if domain.kind != "multiclass":
            raise ConfigError(
                f"keep={keep} needs classes; domain {domain.name!r} has {domain.kind} labels: use reservoir"
            )
        labels = np.asarray([data.dataset.targets[row] for row in own], np.int64)
        if keep == "balanced":
            found[number] = own[balanced(labels, part)]
        else:
            features = seen_by(task, data, {number: own}, lambda batch: task.model_step(batch).features)
            found[number] = own[herding(features.numpy(), labels, part)]
    return found


@torch.no_grad()
def seen_by(task: Task, data: Any, rows: Rows, read: Callable[[Batch], Tensor]) -> Tensor:
    """What ``read`` makes of these rows in evaluation mode, one pass cut over processes: [n, ...] on the CPU.

    It runs in the run's precision, and float32 comes back. The order is that of ``rows``: domain by domain, as given.
    The task's modes and generators are left as they were; it is moved to the device it trains on.

    Args:
        task: put in evaluation mode for the pass.
        data: bound.
        rows: dataset rows by domain id.
        read: from a batch to one value a row.
    """
    task.to(task.device)
    found: dict[int, Tensor] = {}
    run = task._trainer  # None outside of a run
    with evaluating(task), run.precision_plugin.val_step_context() if run is not None else nullcontext():
        for batch in one_pass(data, rows):
            batch = placed(batch, task.backbone)
            values = read(batch).float().cpu()
            for i, key in enumerate(batch.keys):
                if key.domain >= 0:
                    found[key.row] = values[i]
    if dist.is_available() and dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, {row: value.numpy() for row, value in found.items()})
        found = {row: torch.from_numpy(value) for part in parts for row, value in part.items()}
    return torch.stack([found[int(row)] for own in rows.values() for row in own])


def ids_of_rows(data: Any, rows: Rows) -> Tensor:
    """[n, 2] int64: domain id and sample id of each row. A sample id is of content, which domains may share."""
    found = [(number, int(data.dataset.sample_ids[row])) for number, own in sorted(rows.items()) for row in own]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def rows_of(data: Any, ids: Tensor) -> Rows:
    """Dataset rows of the source with these domain and sample ids [n, 2], by domain id.

    Raises:
        ConfigError: one is not there, so the data is not what a checkpoint was saved with.
    """
    wanted = {(number, content) for number, content in ids.tolist()}
    everything = training_rows(data, "source")
    sample = data.dataset.sample_ids
    found = {n: np.array([r for r in own if (n, int(sample[r])) in wanted]) for n, own in everything.items()}
    if sum(map(len, found.values())) < len(wanted):
        raise ConfigError("the source rows of a memory are not those of the checkpoint; resume with the run's own data")
    return {n: rows for n, rows in found.items() if len(rows)}


class Rehearsing(Callback):
    """Base of the methods whose memory stands in every training batch; a checkpoint holds its ids.

    Attributes:
        rows: dataset rows of the memory by domain id.
        ids: [n, 2] domain and sample ids of these rows.
    """

    name: str
    rows: Rows
    ids: Tensor
    _data: Any = None
    _share: float = 0.5
    _labels: bool = True

    def remember(self, data: Any, rows: Rows, share: float, labels: bool = True) -> None:
        """Put a memory into the batches; called before the loader is made."""
        self._data, self._share, self._labels, self.rows = data, share, labels, rows
        self.ids = ids_of_rows(data, rows)
        data.memories[self.name] = Memory(rows, share, labels)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the memory for the run that starts from this one."""
        assert isinstance(pl_module, Task)
        leave_memory(pl_module, self.name, self.ids)

    def state_dict(self) -> dict[str, Any]:
        """Domain and sample ids of the memory."""
        return {"ids": self.ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the memory of the checkpoint; only in a fit, where the loader is made after this."""
        if self._data is not None:
            self.remember(self._data, rows_of(self._data, state_dict["ids"]), self._share, self._labels)
