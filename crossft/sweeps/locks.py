"""The lock of a run, which its process inherits, and beside it the lock of its owner, which it does not.

The owner started the run and waits for it: a sweep, an element of an array job. The system releases a lock when the
last process that holds it is gone. So a run lives as long as ``logs/RUN.lock`` is held, and it is an orphan where
nobody holds ``logs/RUN.owner`` too. A process number in a file goes stale, and says nothing on another machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from crossft.errors import RunError

__all__ = ["RunLock", "locked", "orphaned"]


@dataclass(frozen=True)
class RunLock:
    """Both locks of a run, held by this process.

    Attributes:
        run: descriptor to be inherited by the run's process.
        owner: descriptor that only the run's owner has.
    """

    run: int
    owner: int

    def release(self) -> None:
        """Let others have the run, once its process is gone too."""
        os.close(self.run)
        os.close(self.owner)


def locked(path: Path, wait: bool = False) -> RunLock | None:
    """Take the locks of a run, ``path`` and its owner's; None where another process has it and ``wait`` is false.

    Raises:
        RunError: the file system has no locks.
    """
    run = _flock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    if run is None:
        return None
    try:
        owner = _flock(path.with_suffix(".owner"), fcntl.LOCK_EX)  # waits for `orphaned` of another sweep at most
    except BaseException:
        os.close(run)
        raise
    assert owner is not None
    return RunLock(run, owner)


def orphaned(path: Path) -> bool:
    """Whether the owner of a run that is locked is gone: the run lives on, and nobody waits for it."""
    owner = _flock(path.with_suffix(".owner"), fcntl.LOCK_SH | fcntl.LOCK_NB)
    if owner is not None:
        os.close(owner)
    return owner is not None


def _flock(path: Path, how: int) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise RunError(
            f"{path}: the file system refuses locks ({error}); put run.root on one that has flock"
        ) from error
    return descriptor
