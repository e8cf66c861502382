"""``crossft sweep wandb FILE`` registers a sweep; ``wandb agent`` starts ``crossft sweep agent`` for each run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossft.cli.wandb_key import has_key
from crossft.errors import ConfigError, RunError
from crossft.runs import RunFolder
from crossft.sweeps.agent import SEED, asked_arm, read_asked, registration
from crossft.sweeps.file import SweepFile
from crossft.sweeps.locks import RunLock, locked
from crossft.sweeps.plan import make_plan, one_run
from crossft.sweeps.search import make_search
from crossft.sweeps.state import State, clear, state_of

__all__ = ["command_of", "register", "start"]


def register(sweep: SweepFile, flags: Sequence[str], allow: Sequence[str]) -> int:
    """Check every config, register the sweep with W&B, and print the command that runs it.

    Raises:
        ConfigError: no key is configured, or a config is refused.
        RunError: W&B refuses the sweep.
    """
    content = registration(sweep, flags, allow)
    if not has_key():
        raise ConfigError(
            "crossft sweep wandb needs a key for W&B: log in with `wandb login`, or set WANDB_API_KEY; without one, "
            f"`crossft sweep run {sweep.path}` runs the same file on this machine"
        )
    make_search(sweep, allow) if sweep.method == "bayes" else make_plan(sweep, allow)
    import wandb

    project = str(sweep.fixed.get("wandb.project") or "crossft")
    entity = sweep.fixed.get("wandb.entity") or os.environ.get("WANDB_ENTITY")
    try:
        name = wandb.sweep(content, entity=entity, project=project)
    except Exception as error:  # whatever the service does
        raise RunError(f"W&B did not take the sweep: {error}") from error
    print(f"run it, on any number of machines:\n  wandb agent {f'{entity}/' if entity else ''}{project}/{name}")
    return 0


def start(sweep: SweepFile, file: Path, allow: Sequence[str]) -> int:
    """Become the run that the agent asks for: this process turns into ``crossft fit`` or ``crossft resume``.

    So the agent's signals reach the run, and processes that Lightning adds are started by the run's own command line. A
    run that is finished already is not trained again; the agent's W&B run gets its results.
    """
    asked = read_asked(file)
    command, folder, lock = command_of(sweep, asked, allow)
    if not command:
        return _tell(folder)
    for descriptor in (lock.run, lock.owner):
        os.set_inheritable(descriptor, True)  # until the run's process ends
    print(f"$ crossft {' '.join(command)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "crossft.cli", *command])


def command_of(
    sweep: SweepFile, asked: dict[str, Any], allow: Sequence[str] = (), program: Sequence[str] | None = None
) -> tuple[list[str], RunFolder, RunLock]:
    """The arguments after ``crossft`` for what the agent asks, the run folder, and the run's lock.

    The arguments are empty where the run is finished.
    """
    run = one_run(sweep, asked_arm(sweep, asked), int(asked[SEED]), allow, program)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(run.log.with_suffix(".lock"), wait=True)
    assert lock is not None
    if state_of(run.folder) is State.FINISHED:
        return [], run.folder, lock
    fresh = clear(run.folder)
    return (["fit", *run.flags] if fresh else ["resume", str(run.folder.path), *run.allow]), run.folder, lock


def _tell(folder: RunFolder) -> int:
    """Give the agent's W&B run the results of a run that was finished before."""
    import wandb

    from crossft.cli.tracking import log_outputs

    print(f"{folder.path} is finished: its results are told to W&B")
    with wandb.init(dir=str(folder.path), name=folder.path.name) as run:
        log_outputs(run, folder, "none")
    return 0
