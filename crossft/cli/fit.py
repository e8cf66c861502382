"""``crossft fit`` and ``crossft resume``."""

from __future__ import annotations

import argparse
import os
import signal

import yaml

from crossft.callbacks.monitoring import Stopping
from crossft.cli.launch import Launch
from crossft.cli.legs import Chain
from crossft.cli.parser import Settings
from crossft.cli.safety import take_allowed
from crossft.cli.sequence import Sequence
from crossft.errors import ConfigError, Interrupted, RunError
from crossft.runs import RunFolder
from crossft.sweeps.slurm import requeue

__all__ = ["run"]


def run(command: str, arguments: list[str]) -> int:
    """Train a run, a chain of two, or a sequence; or continue one from its folder."""
    try:
        with Stopping() as stopping:
            return _fit(arguments, stopping) if command == "fit" else _resume(arguments, stopping)
    except Interrupted as stop:
        if not stop.requeue or "SLURM_JOB_ID" not in os.environ or not Launch().first:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's answer to a requeue; nothing is left to be stopped
        raise Interrupted(f"{stop}; {requeue(os.environ['SLURM_JOB_ID'])}", requeue=True) from stop


def _fit(arguments: list[str], stopping: Stopping) -> int:
    _chain(Settings(arguments, "fit"), stopping).run()
    return 0


def _resume(arguments: list[str], stopping: Stopping) -> int:
    arguments, allowed = take_allowed(arguments)
    parser = argparse.ArgumentParser("crossft resume", description="Continue a run from its folder, to the same bits.")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--allow", metavar="PACKAGE", help="let its config name classes of one more package")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        raise ConfigError(
            f"crossft resume takes no settings ({rest[0]}): a run is continued with its own config; "
            "for other settings start a new run, with --init for the model"
        )
    folder = _whole(RunFolder.open(options.run))
    status = folder.summary()["status"]
    if status in ("finished", "pruned"):
        print(f"{folder.path} is {status}: nothing to resume")
        return 0
    if not folder.config.is_file():
        raise RunError(f"{folder.config} is missing: the run never began; remove the folder and start it again")
    settings = Settings(yaml.safe_load(folder.config.read_text(encoding="utf-8")), "resume", allowed)
    _chain(settings, stopping, folder).run()
    return 0


def _chain(settings: Settings, stopping: Stopping, folder: RunFolder | None = None) -> Chain:
    return (Sequence if settings.config.sequence else Chain)(settings, stopping, folder)


def _whole(folder: RunFolder) -> RunFolder:
    """The sequence that a run is a leg of, else the run."""
    around = RunFolder(folder.path.absolute().parent)
    return around if around.sequence.is_file() else folder
