"""Models out of runs and checkpoints: which file, and which of its heads fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from crossft.callbacks.monitoring import AtomicCheckpointIO
from crossft.errors import CheckpointError, CrossftError
from crossft.runs import RunFolder, read_json
from crossft.tasks import Task
from crossft.types import Domain, head_of

__all__ = ["SEQUENCE", "checkpoint_of", "load_weights", "read_domains"]

SEQUENCE = "sequence.json"
"""In the folder of a sequence: the matrix of its legs, and their folders."""


def checkpoint_of(path: Path | str) -> Path:
    """The checkpoint file behind a path: itself, or the one a finished run's summary names (else ``last.ckpt``);
    of a sequence, that of its last leg.

    Raises:
        CheckpointError: there is none, or the summary names a file outside the run's checkpoints.
        RunError: the path does not exist, or is no run folder.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".json":
        return path
    folder = RunFolder.open(path)
    if (folder.path / SEQUENCE).is_file():
        return checkpoint_of(folder.path / str(read_json(folder.path / SEQUENCE)["runs"][-1]))
    named = str(folder.summary().get("checkpoint") or "checkpoints/last.ckpt")
    file = folder.path / named
    if not file.resolve().is_relative_to(folder.checkpoints.resolve()):
        raise CheckpointError(
            f"{folder.summary_file} names the checkpoint {named!r}, which lies outside {folder.checkpoints}; "
            "only a file in there is read"
        )
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: the run has saved nothing yet; resume it, or choose another run")
    return file


def read_domains(checkpoint: dict[str, Any], path: Path) -> tuple[Domain, ...]:
    """The domains a checkpoint was trained with, from its plain values.

    Raises:
        CheckpointError: it holds none, or they are malformed.
    """
    found = checkpoint.get("domains")
    if not isinstance(found, list) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} was not written by crossft: it lacks domains or a state_dict")
    try:
        return tuple(Domain(d["name"], d["role"], d["kind"], tuple(d["labels"])) for d in found)
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} holds malformed domains ({error}); use another checkpoint") from error


def load_weights(task: Task, path: Path) -> frozenset[str]:
    """Load a checkpoint's backbone, and each head whose label space the task has.

    A head whose label space the checkpoint lacks stays as it is.

    Returns:
        The keys of the task's heads that were loaded.

    Raises:
        CheckpointError: the file cannot be read, or its backbone does not fit.
    """
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    theirs = read_domains(checkpoint, path)
    their_keys = head_of(theirs)
    by_space = {d.space: their_keys[d.name] for d in theirs}
    state: dict[str, Tensor] = dict(checkpoint["state_dict"])
    wanted = {k: v for k, v in state.items() if not k.startswith("heads.")}
    loaded: set[str] = set()
    for domain in task.domains:
        own, other = task.head_keys[domain.name], by_space.get(domain.space)
        if other is not None and own not in loaded:
            prefix = f"heads.{other}."
            wanted |= {f"heads.{own}.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
            loaded.add(own)
    for key in task.heads:
        if key not in loaded:
            wanted |= {f"heads.{key}.{k}": v for k, v in task.heads[key].state_dict().items()}
    try:
        task.load_state_dict(wanted)
    except CrossftError:
        raise
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit this model: {' '.join(str(error).split())[:400]}; "
            "use the backbone (name, image size, pooling) the checkpoint was trained with"
        ) from error
    return frozenset(loaded)
