"""What became of a run, read from its folder; nothing else is kept."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path

from crossft.errors import RunError
from crossft.runs import RunFolder

__all__ = ["State", "begun", "clear", "reason", "source_finished", "state_of", "tail"]


_EARLY = {"checkpoints", "summary.json", "config.yaml", "splits.json"}
"""What a run folder holds before its run has begun."""


class State(Enum):
    """State of a run."""

    MISSING = "missing"
    """Nothing was trained."""
    UNFINISHED = "unfinished"
    """It was stopped or killed, or still runs; ``crossft resume`` goes on."""
    FINISHED = "finished"
    FAILED = "failed"
    PRUNED = "pruned"
    """A search ended it early; nothing is left to do."""

    @property
    def ended(self) -> bool:
        """Whether the run came to its planned end."""
        return self in (State.FINISHED, State.PRUNED)


def state_of(folder: RunFolder) -> State:
    """Read the state of a run; a summary that cannot be read counts as failed."""
    try:
        status = folder.summary()["status"] if folder.summary_file.is_file() else "running"
    except RunError:
        return State.FAILED
    if status in ("finished", "failed", "pruned"):
        return State(status)
    return State.UNFINISHED if _begun(folder) else State.MISSING


def _begun(folder: RunFolder) -> bool:
    """Whether the folder holds all that a resume needs: it is written before anything is trained."""
    return folder.config.is_file() and folder.splits.is_file()


def clear(folder: RunFolder) -> bool:
    """Remove what a run left that died before it began; call it only while no process runs it.

    Returns:
        Whether the run can be started afresh: False where it had begun, and is to be resumed.
    """
    if _begun(folder):
        return False
    if folder.path.is_dir():
        if any(folder.checkpoints.glob("*")):
            raise RunError(f"{folder.path} holds checkpoints but no config.yaml; move it away, or restore the file")
        shutil.rmtree(folder.path)
    return True


def begun(path: Path | str) -> RunFolder | None:
    """The run in a folder, finished or to be continued; None where there is none and one can be started afresh.

    What a run left that died before it began is removed; any other content is left to `RunFolder.create` to refuse.
    """
    folder = RunFolder(path)
    if state_of(folder) is State.FAILED and not any(folder.checkpoints.glob("*")):
        return None
    if _begun(folder):
        return folder
    names = {entry.name for entry in folder.path.iterdir()} if folder.path.is_dir() else set()
    if names and all(name in _EARLY or name.startswith(".tmp-") for name in names):
        clear(folder)
    return None


def source_finished(folder: RunFolder) -> bool:
    """Whether the run that this one starts from is known and finished."""
    try:
        parent = folder.summary()["parent"] if folder.summary_file.is_file() else None
    except RunError:
        return False
    return parent is not None and state_of(RunFolder(parent)) is State.FINISHED


def reason(folder: RunFolder, log: Path) -> str:
    """Why a run failed: as its summary says, else the end of its log."""
    try:
        error = folder.summary()["error"] if folder.summary_file.is_file() else None
    except RunError as unreadable:
        error = str(unreadable)
    return str(error) if error else tail(log)


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log that say something, as one text: the error where there is one.

    Only what the last process wrote counts; its command stands in a line that begins with ``$``.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        text = file.read().decode("utf-8", errors="replace")
    said = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    starts = [index for index, line in enumerate(said) if line.startswith("$ crossft ")]
    said = said[starts[-1] + 1 :] if starts else said
    errors = [line for line in said if line.startswith("crossft: error: ")]
    return errors[-1].removeprefix("crossft: error: ") if errors else " | ".join(said[-lines:])
