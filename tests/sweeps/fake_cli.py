"""Stands in for ``crossft fit`` and ``crossft resume``: writes run folders as they do, and trains nothing.

Every start is noted in ``starts.txt`` beside the run folders. Settings come from the flags ``--fake.NAME=VALUE``:
``seconds`` (of the run), ``source`` (seconds of its source leg), ``end`` (finish, fail, silent, kill, dead,
deaf, early), ``once`` (the run stops that way the first time only), and ``x`` (what a search looks for: 0.3 is
best). A run of a search reports three validations.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock

from crossft.runs import RunFolder
from crossft.sweeps.early import EarlyTerminate
from crossft.sweeps.study import TrialReports


def main() -> int:
    command, *words = sys.argv[1:]
    if command == "resume":
        folder = RunFolder.open(words[0])
        flags = json.loads(folder.config.read_text())
    else:
        flags = dict(word[2:].split("=", 1) for word in words)
        folder = RunFolder(flags["run.dir"])
        if flags.get("run.resume") == "true" and folder.summary_file.is_file():
            command, folder = "resume", RunFolder.open(folder.path)
            if folder.summary()["status"] == "finished":
                return 0
    with (folder.path.parent / "starts.txt").open("a") as file:
        file.write(f"{command} {folder.path.name} {os.environ['OMP_NUM_THREADS']} {os.getpid()} {os.getppid()}\n")
    if flags.get("fake.end") == "early":
        print("crossft: error: data.root=nowhere: there is no such folder", file=sys.stderr)
        return 2
    if flags.get("fake.end") == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "fit":
        source = folder.path.parent / f"source-{flags.get('fake.leg', 'a')}"
        domains = {"source": ["photo"], "target": [flags.get("data.target", "sketch")]}
        names = {"experiment": flags["experiment"], "arm": flags["arm"], "seed": int(flags["seed_everything"])}
        RunFolder.create(folder.path, **names, parent=str(source), domains=domains)
        folder.config.write_text(json.dumps(flags))
        folder.splits.write_text("{}")
    leg(RunFolder(folder.summary()["parent"]), float(flags.get("fake.source", 0)))
    folder.write_summary(status="running", error=None)
    print("epoch 1/2  step 1", flush=True)
    if command == "fit" or "fake.once" not in flags:
        end(folder, flags)
    if folder.summary()["status"] == "failed":
        return 1
    accuracy = 0.5 + 0.01 * int(flags["seed_everything"]) + float(flags.get("fake.gain", 0))
    accuracy -= (float(flags.get("fake.x", 0.3)) - 0.3) ** 2
    if ended_early(folder, flags, accuracy):
        return 0
    metrics = {
        "target/val/accuracy": accuracy,
        "target/test/accuracy": accuracy,
        "source/test/accuracy": 0.9,
        "source/retention": 0.9,
    }
    metrics.setdefault(flags.get("trial.metric", "target/val/accuracy"), accuracy)
    folder.write_summary(status="finished", seconds=2.0, metrics=metrics, primary={"target": "accuracy"})
    return 0


def ended_early(folder: RunFolder, flags: dict[str, str], accuracy: float) -> bool:
    if "trial.study" not in flags:
        return False
    early = EarlyTerminate(**json.loads(flags["trial.early_terminate"]))
    reports = TrialReports(Path(flags["trial.storage"]), flags["trial.study"], int(flags["trial.number"]), early)
    for validation in (1, 2, 3):
        if reports.worse(validation, accuracy * validation / 3):
            folder.write_summary(status="pruned", error=f"ended early after validation {validation}")
            return True
    return False


def leg(folder: RunFolder, seconds: float) -> None:
    with FileLock(folder.path.parent / f".{folder.path.name}.lock"):
        if not folder.summary_file.is_file():
            with (folder.path.parent / "starts.txt").open("a") as file:
                file.write(f"leg {folder.path.name} {time.monotonic()}\n")
            time.sleep(seconds)
            folder.write_summary(status="finished", seconds=3.0)


def end(folder: RunFolder, flags: dict[str, str]) -> None:
    how = flags.get("fake.end", "finish")
    stopped: list[int] = []
    deaf = how == "deaf"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda number, frame: stopped.append(number))
    until = time.monotonic() + float(flags.get("fake.seconds", 0))
    while time.monotonic() < until:
        time.sleep(0.02)
        if stopped:
            folder.write_summary(status="interrupted", error="stopped by SIGTERM")
            sys.exit(143)
    if how == "fail":
        folder.write_summary(status="failed", error="TrainingError: the loss is NaN at step 3")
    elif how == "silent":
        print("MemoryError: too much")
        sys.exit(1)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
