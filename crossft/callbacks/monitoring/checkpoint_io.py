"""Checkpoints written whole or not at all, and read as tensors and plain values only."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from crossft.errors import CheckpointError, RunError, UnsafeCheckpointError
from crossft.runs import RunFolder, read_json, replacing, write_json

__all__ = [
    "AtomicCheckpointIO",
    "by_step",
    "check",
    "latest_valid",
    "load_checkpoint",
    "manifest_of",
    "publish",
    "sha256",
]

_BUILT = ("_class_path", "_instantiator")
"""Hyper-parameters by which Lightning's ``load_from_checkpoint`` imports and calls whatever they name."""

_STEP = re.compile(r"^step-(\d+)\.ckpt$")


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(path: Path) -> Path:
    """Where a checkpoint's manifest lies: beside it."""
    return path.with_name(path.name + ".manifest.json")


def check(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: it is missing, incomplete or changed since it was written.
    """
    manifest = manifest_of(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; `crossft resume` finds the latest valid checkpoint of a run")
    if not manifest.is_file():
        raise CheckpointError(f"{path} has no manifest ({manifest.name}): it was not completely written")
    try:
        entry = read_json(manifest)
    except RunError as error:
        raise CheckpointError(f"{manifest} is damaged ({error.__cause__}), so {path.name} is not trusted") from error
    if not isinstance(entry, dict) or entry.get("file") not in (path.name, None):
        raise CheckpointError(f"{manifest} does not describe {path.name}; remove both")
    if entry.get("bytes") != path.stat().st_size or entry.get("sha256") != sha256(path):
        raise CheckpointError(f"{path} does not match the checksum in {manifest.name}: it is damaged; use another one")


def by_step(folder: Path) -> dict[int, Path]:
    """Every ``step-N.ckpt`` in ``folder`` by N, the newest first, valid or not."""
    found = {int(m.group(1)): p for p in folder.glob("*") if (m := _STEP.match(p.name))}
    return dict(sorted(found.items(), reverse=True))


def latest_valid(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is complete and undamaged, or None."""
    for path in by_step(folder).values():
        try:
            check(path)
        except CheckpointError:
            continue
        return path
    return None


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint as tensors and plain values; nothing in it can import or run anything.

    Raises:
        UnsafeCheckpointError: it holds anything else, or names what is to be built with it.
        CheckpointError: it cannot be read.
    """
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise CheckpointError(f"{path} is not a readable checkpoint: {_first_line(error)}") from None
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors and plain values, so it is not loaded: {_first_line(error)}. "
            "Convert it with the program that wrote it, to safetensors or a plain state dict"
        ) from None
    except Exception as error:  # torch's unpickler lets whatever a malformed file leads to through, as IndexError
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint (a mapping)")
    for part, held in loaded.items():
        for key in _BUILT if isinstance(held, dict) else ():
            if key in held:
                raise UnsafeCheckpointError(
                    f"{path} names code to run ({part}/{key}: {held[key]!r:.100}), so it is not loaded; "
                    f"where it comes from Lightning's command line, remove {part} from it"
                )
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def publish(path: Path, name: str) -> Path:
    """Make ``name`` beside ``path`` the same checkpoint (a hard link where the file system has them)."""
    target = path.with_name(name)
    manifest = manifest_of(target)
    manifest.unlink(missing_ok=True)
    with replacing(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
    write_json(manifest, {**read_json(manifest_of(path)), "file": name})
    return target


class AtomicCheckpointIO(CheckpointIO):
    """Write beside the target, flush, rename; then the manifest with the checksum, last.

    Lightning's default writes to TMPDIR and moves, which across file systems leaves half a file after a kill.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` and its manifest."""
        path = Path(path)
        manifest_of(path).unlink(missing_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            size, digest = temporary.stat().st_size, sha256(temporary)
        entry = {"schema": 1, "file": path.name, "bytes": size, "sha256": digest, "step": checkpoint["global_step"]}
        write_json(manifest_of(path), entry)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check against the manifest, then read tensors and plain values, whatever is asked.

        Only a file outside of a run folder may lack a manifest.
        """
        path = Path(path)
        if manifest_of(path).is_file() or RunFolder(path.absolute().parent.parent).summary_file.is_file():
            check(path)
        return load_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, its manifest first, so that what is left is never taken for complete."""
        path = Path(path)
        manifest_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
