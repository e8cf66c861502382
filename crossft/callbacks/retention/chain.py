"""What one leg of a chain leaves for the next: where the run before lies, and which rows it remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossft.errors import CheckpointError
from crossft.runs import RunFolder
from crossft.tasks import Task

__all__ = ["leave_memory", "run_before", "still_remembered"]

Rows = dict[int, NDArray[np.int64]]


def run_before(task: Task) -> RunFolder | None:
    """The run that this one starts from; None where it starts from none, or keeps no run folder."""
    anchors = task.attachments.anchors
    where = task.trainer.default_root_dir if anchors is None else anchors.folder.parent
    folder = RunFolder(where)
    parent = folder.summary().get("parent") if folder.summary_file.is_file() else None
    return RunFolder.open(parent) if parent else None


def leave_memory(task: Task, name: str, ids: Tensor) -> None:
    """Write what a method remembers as ``anchors/NAME.memory.safetensors``, for the leg after.

    Args:
        task: whose sources the memory is of.
        name: the method's.
        ids: [n, 2] domain and sample ids of the remembered rows.
    """
    if task.attachments.anchors is not None:
        sources = {i: d.name for i, d in enumerate(task.domains) if d.role == "source"}
        kept = {n: ids[ids[:, 0] == i, 1] for i, n in sources.items()}
        task.attachments.anchors.put(f"{name}.memory", kept)


def still_remembered(task: Task, data: Any, name: str, rows: Rows) -> Rows:
    """``rows`` without those that the leg before had forgotten already; domains it did not know stay whole.

    Args:
        task: its run folder says what run was before.
        data: prepared.
        name: the method's, in both legs.
        rows: dataset rows by domain id.

    Raises:
        CheckpointError: the other leg's file cannot be read, or is not about this data.
    """
    parent = run_before(task)
    file = None if parent is None else parent.anchors / f"{name}.memory.safetensors"
    if file is None or not file.is_file():
        return rows
    try:
        with safe_open(str(file), framework="pt") as memory:
            known = {name: set(memory.get_tensor(name).tolist()) for name in memory.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a memory: {error}; remove it to choose the rows anew"
        ) from error
    found: Rows = {}
    for number, own in rows.items():
        if (ids := known.get(task.domains[number].name)) is not None:
            kept = np.array([int(data.dataset.sample_ids[r]) in ids for r in own], bool)
            if not kept.any():
                raise CheckpointError(
                    f"{file} remembers no row of {task.domains[number].name!r} that this data has; start the leg from "
                    "a run on the same data"
                )
            own = own[kept]
        found[number] = own
    return found
