"""A folder in memory for one run, shared by its processes."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path

from lightning.pytorch import Trainer

__all__ = ["memory_folder"]

PREFIX = "crossft-prefix-"


def memory_folder(owner: object, trainer: Trainer) -> Path:
    """A folder in shared memory (in the temporary folder where there is none), removed when ``owner`` is.

    All processes of the run get the same name. Folders of processes that were killed are removed first.
    """
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for path in base.glob(f"{PREFIX}*"):
        if not _alive(path.name.removeprefix(PREFIX).partition("-")[0]):
            shutil.rmtree(path, ignore_errors=True)
    name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    folder = base / trainer.strategy.broadcast(name)
    folder.mkdir(exist_ok=True)
    if trainer.local_rank == 0:
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
