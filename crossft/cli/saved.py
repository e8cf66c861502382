"""Runs opened again: to be tested, to predict, to be exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossft.cli.parser import Settings
from crossft.cli.screen import quiet_lightning
from crossft.cli.weights import checkpoint_of, load_weights
from crossft.errors import CheckpointError, ConfigError, RunError
from crossft.runs import RunFolder, read_json
from crossft.tasks import Task

__all__ = ["Saved", "open_run", "read_splits", "take_option"]


@dataclass
class Saved:
    """A run's config and model.

    Attributes:
        folder: the run folder.
        checkpoint: the file the model comes from.
        settings: the run's config, with the flags of this command laid over it.
        task: the model, over the run's own domains and label names.
    """

    folder: RunFolder
    checkpoint: Path
    settings: Settings
    task: Task


def open_run(command: str, arguments: Sequence[str]) -> Saved:
    """Open ``RUN [FLAGS]``: a run folder or a checkpoint inside one, and settings that differ from the run's.

    Label names come from the run's config, never from the data again.

    Raises:
        ConfigError: no run was named.
        RunError, CheckpointError: it cannot be opened.
    """
    quiet_lightning()
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"usage: crossft {command} RUN [FLAGS]: name the run folder, or a checkpoint inside one, first"
        )
    folder = RunFolder.open(arguments[0])
    checkpoint = checkpoint_of(arguments[0])
    if not folder.config.is_file():
        raise RunError(f"{folder.config} is missing; without the run's config its model cannot be built again")
    settings = Settings(["--config", str(folder.config), *arguments[1:]], command)
    model: Any = settings.config.model.init_args
    if not model.get("domains"):
        raise RunError(f"{folder.config} holds no model.init_args.domains; it is not the config of a run")
    if "weights" in model.backbone.get("init_args", {}):
        model.backbone.init_args.weights = None  # the checkpoint's are loaded over them anyway
    task: Task = settings.build("model").model
    loaded = load_weights(task, checkpoint)
    if set(task.heads) != loaded:
        raise CheckpointError(f"{checkpoint} lacks the head of {', '.join(sorted(set(task.heads) - loaded))}")
    return Saved(folder, checkpoint, settings, task.eval())


def read_splits(folder: RunFolder) -> dict[str, dict[str, list[int]]] | None:
    """The splits a run was made with, or None where it kept none.

    Raises:
        RunError: the file holds anything but domain -> split -> sample ids.
    """
    if not folder.splits.is_file():
        return None
    found = read_json(folder.splits)
    parts = list(found.values()) if isinstance(found, dict) else [None]
    lists = [ids for part in parts for ids in (part.values() if isinstance(part, dict) else [None])]
    if not all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists):
        raise RunError(f"{folder.splits} does not hold sample ids by domain and split; restore the file")
    return dict(found)


def take_option(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Split ``--NAME VALUE`` or ``--NAME=VALUE`` off the arguments.

    Raises:
        ConfigError: the option stands without a value.
    """
    rest: list[str] = []
    found: str | None = None
    words = iter(arguments)
    for word in words:
        if word == f"--{name}":
            found = next(words, "")
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    if found == "":
        raise ConfigError(f"--{name} needs a value")
    return rest, found
