"""A 2 x 3 x 3-seed ablation on real images, its sweep killed twice: the same results as a sweep that nobody killed.

``make soak`` runs it, in about 15 minutes: ``configs/sweeps/ablation.yaml`` on pacs-96, photo -> sketch, cut down so
that a run takes a few seconds beside the start of its process. ``CROSSFT_SLOTS`` is the number of runs at a time (2).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crossft.runs import RunFolder, read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.data]

FILE = Path(__file__).resolve().parents[2] / "configs" / "sweeps" / "ablation.yaml"
RUNS, SOURCES = 2 * 3 * 3, 3
SMALL = (
    "--data.source=photo", "--data.target=sketch", "--data.limit=300", "--data.shots=3", "--data.batch_size=16",
    "--model.backbone.image_size=64", "--trainer.max_epochs=4", "--source_leg.trainer.max_epochs=1",
    "--trainer.accelerator=cpu", "--wandb.mode=disabled",
)  # fmt: skip
Result = tuple[dict[str, float], dict[tuple[int, str], str]]


class Sweep:
    """One sweep of the file, with its runs in a folder of its own."""

    def __init__(self, root: Path, data: Path) -> None:
        slots = os.environ.get("CROSSFT_SLOTS", "2")
        flags = (f"--slots={slots}", "--threads=1", f"--data.root={data}", f"--run.root={root}", *SMALL)
        self.command = [sys.executable, "-m", "crossft.cli", "sweep", "run", str(FILE), *flags]
        self.log = root.with_suffix(".log")
        self.runs = root / "ablation"

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        assert self.start().wait() == 0, self.log.read_text()[-2000:]

    def folders(self) -> list[RunFolder]:
        return [RunFolder(p.parent) for p in sorted(self.runs.glob("*weight=*/summary.json"))]

    def statuses(self) -> list[str]:
        return [folder.summary()["status"] for folder in self.folders()]

    def results(self) -> dict[str, Result]:
        """By arm and seed: the final metrics, and all that was logged while training, as texts that NaN equals."""
        found = {}
        for folder in self.folders():
            summary = folder.summary()
            assert summary["status"] == "finished", summary
            logged = {(row.step, row.name): repr(row.value) for row in read_metrics(folder.metrics)}
            found[f"{summary['arm']} s{summary['seed']}"] = (summary["metrics"], logged)
        return found

    def count(self, words: str) -> dict[str, int]:
        return {log.stem: log.read_text().count(words) for log in self.runs.glob("logs/*.log")}


def descendants(pid: int) -> list[int]:
    try:
        children = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [d for child in children for d in (child, *descendants(child))]


def kill(process: subprocess.Popen[bytes], with_runs: bool) -> None:
    runs = descendants(process.pid)
    process.kill()
    for pid in runs if with_runs else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_sweep_killed_twice_equals_one_that_was_not(tmp_path: Path, shared_data: Path) -> None:
    chance = random.Random(os.environ.get("CROSSFT_KILL_SEED", "7"))
    killed, whole = (Sweep(tmp_path / name, shared_data / "pacs-96") for name in ("killed", "whole"))
    for with_runs in (False, True):  # its runs live on and are waited for; they die with it and are resumed
        process = killed.start()
        time.sleep(chance.uniform(20, 80))
        while with_runs and killed.statuses().count("running") == 0:  # in the middle of a run, not of its imports
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        assert process.poll() is None, killed.log.read_text()[-2000:]
        kill(process, with_runs)
        print(f"killed {'with its runs' if with_runs else 'alone'}: {killed.statuses()}")
    killed.finish()
    whole.finish()

    expected, found = whole.results(), killed.results()
    assert len(expected) == RUNS
    assert found == expected
    for sweep in (killed, whole):
        sources = [RunFolder(path).summary()["status"] for path in sweep.runs.glob("source-*") if path.is_dir()]
        assert sources == ["finished"] * SOURCES
        ends = sweep.count("run folder: ")
        assert sum(ends.values()) == RUNS + SOURCES, "each run and each source came to its end exactly once"
    assert sum(whole.count("$ crossft fit ").values()) == RUNS
    assert not any(whole.count("$ crossft resume ").values())
    starts = sum(killed.count("$ crossft ").values())
    assert RUNS <= starts <= RUNS + int(os.environ.get("CROSSFT_SLOTS", "2")), "only what was killed started again"
