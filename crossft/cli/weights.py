"""Models out of runs and checkpoints: which file, and which of its heads fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from crossft.backbones.batchnorm import with_domains
from crossft.callbacks.monitoring import AtomicCheckpointIO, latest_valid
from crossft.callbacks.monitoring.checkpoint_io import check
from crossft.errors import CheckpointError, ConfigError, CrossftError
from crossft.runs import RunFolder, read_json
from crossft.tasks import Task
from crossft.types import Domain, head_of

__all__ = ["checkpoint_of", "load_weights", "read_domains"]


def checkpoint_of(path: Path | str) -> Path:
    """The checkpoint file behind a path: itself, or the one a finished run's summary names (else ``last.ckpt``);
    of a sequence, that of its last leg. Where ``last.ckpt`` of an unfinished run is damaged, its newest valid one.

    Raises:
        CheckpointError: there is none, or ``summary.json`` or ``sequence.json`` names one outside of its folder.
        RunError: the path does not exist, or is no run folder.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".json":
        return path
    folder = RunFolder.open(path)
    if folder.sequence.is_file():
        found = read_json(folder.sequence)
        runs = found.get("runs") if isinstance(found, dict) else None
        return checkpoint_of(
            _named(folder.sequence, runs[-1] if isinstance(runs, list) and runs else None, folder.path)
        )
    named = folder.summary().get("checkpoint") or "checkpoints/last.ckpt"
    file = _named(folder.summary_file, named, folder.checkpoints)
    if folder.summary()["status"] != "finished" and (newest := latest_valid(folder.checkpoints)) is not None:
        try:
            check(file)
        except CheckpointError as error:
            rank_zero_only(print)(f"{error}; taken instead: {newest.name}, the newest valid one")
            return newest
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: the run has saved nothing yet; resume it, or choose another run")
    return file


def _named(by: Path, named: object, inside: Path) -> Path:
    """The path that a run's file names, from its own folder on; only one inside of ``inside`` is followed."""
    if isinstance(named, str) and "\0" not in named:
        path = by.parent / named
        if inside.resolve() in path.resolve().parents:
            return path
    raise CheckpointError(
        f"{by} names {named!r}, which is no path or lies outside {inside}; only what is in there is read: "
        "restore the file, or name a checkpoint by its own path"
    )


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

    A head whose label space the checkpoint lacks stays as it is. The task's ``known_heads`` are those of the loaded
    that the checkpoint's run, or one before it, has trained.

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
    trained = checkpoint.get("known_heads", list(their_keys.values()))
    if not isinstance(trained, list) or not all(key in their_keys.values() for key in trained):
        raise CheckpointError(f"{path} holds malformed known_heads ({trained!r}); use another checkpoint")
    known: set[str] = set()
    for domain in task.domains:
        own, other = task.head_keys[domain.name], by_space.get(domain.space)
        if other is not None and own not in loaded:
            prefix = f"heads.{other}."
            wanted |= {f"heads.{own}.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
            loaded.add(own)
            known |= {own} if other in trained else set()
    for key in task.heads:
        if key not in loaded:
            wanted |= {f"heads.{key}.{k}": v for k, v in task.heads[key].state_dict().items()}
    try:
        now, then = ([d.name for d in domains] for domains in (task.domains, theirs))
        task.load_state_dict(with_domains(task, wanted, now, then))
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    except CrossftError:
        raise
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit this model: {' '.join(str(error).split())[:400]}; "
            "use the backbone (name, image size, pooling) the checkpoint was trained with"
        ) from error
    task.known_heads = frozenset(known)
    return frozenset(loaded)
