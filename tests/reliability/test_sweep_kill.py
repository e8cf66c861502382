"""A 2 x 3 x 3-seed ablation on real images: killed twice, and on a real SLURM with an arm preempted, it gives the same.

``make soak`` runs it, in about 20 minutes: ``configs/sweeps/ablation.yaml`` on pacs-96, photo -> sketch, cut down so
that a run takes a few seconds beside the start of its process. ``CROSSFT_SLOTS`` is the number of runs at a time (2).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.local_slurm import cluster, missing

from crossft.runs import RunFolder, read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.data, pytest.mark.timeout(5400)]

FILE = Path(__file__).resolve().parents[2] / "configs" / "sweeps" / "ablation.yaml"
RUNS, SOURCES = 2 * 3 * 3, 3
SLOTS = int(os.environ.get("CROSSFT_SLOTS", "2"))
SMALL = (
    "--data.source=photo", "--data.target=sketch", "--data.limit=300", "--data.shots=3", "--data.batch_size=16",
    "--model.backbone.image_size=64", "--trainer.max_epochs=4", "--source_leg.trainer.max_epochs=1",
    "--trainer.accelerator=cpu", "--wandb.mode=disabled",
)  # fmt: skip
Result = tuple[dict[str, float], dict[tuple[int, str], str]]


class Sweep:
    """One sweep of the file, with its runs in a folder of its own."""

    def __init__(self, root: Path, data: Path, *more: str, executor: str = "run") -> None:
        own = (f"--slots={SLOTS}", "--threads=1") if executor == "run" else ("--time=60",)
        flags = (*own, f"--data.root={data}", f"--run.root={root}", *SMALL, *more)
        self.command = [sys.executable, "-m", "crossft.cli", "sweep", executor, str(FILE), *flags]
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Sweep:
    """The sweep that nobody kills."""
    sweep = Sweep(tmp_path_factory.mktemp("whole") / "whole", shared_data / "pacs-96")
    sweep.finish()
    assert sum(sweep.count("$ crossft fit ").values()) == RUNS
    assert not any(sweep.count("$ crossft resume ").values())
    return sweep


def check(sweep: Sweep, whole: Sweep) -> None:
    """Every arm and seed, every source, came to its end exactly once, and to the same numbers."""
    expected, found = whole.results(), sweep.results()
    assert len(expected) == RUNS
    assert found == expected
    for one in (sweep, whole):
        sources = [RunFolder(path).summary()["status"] for path in one.runs.glob("source-*") if path.is_dir()]
        assert sources == ["finished"] * SOURCES
        assert sum(one.count("run folder: ").values()) == RUNS + SOURCES


def test_sweep_killed_twice_equals_one_that_was_not(whole: Sweep, tmp_path: Path, shared_data: Path) -> None:
    chance = random.Random(os.environ.get("CROSSFT_KILL_SEED", "7"))
    killed = Sweep(tmp_path / "killed", shared_data / "pacs-96")
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
    check(killed, whole)
    starts = sum(killed.count("$ crossft ").values())
    assert RUNS <= starts <= RUNS + SLOTS, "only what was killed started again"


@pytest.mark.skipif(bool(missing()), reason=f"no local SLURM: {missing()} not installed (slurm-wlm, munge)")
def test_same_file_on_slurm_with_a_preempted_arm_gives_the_same(
    whole: Sweep, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = ("--trainer.callbacks=interrupting.HoldAt", "--allow=interrupting")
    sweep = Sweep(tmp_path / "slurm", shared_data / "pacs-96", *hold, executor="slurm")
    tests = FILE.parents[2] / "tests" / "cli"
    with cluster() as names:
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FILE.parents[2]), str(tests)]))
        monkeypatch.setenv("HOLD_AT", "3")
        monkeypatch.setenv("HOLD_IN", "last-two-weight=0.1-s1")
        sweep.finish()
        (job,) = sweep.runs.glob("logs/last-two-weight=0.1-s1-*.job")
        log = job.with_suffix(".log")
        wait(lambda: log.is_file() and "holding at step 3" in log.read_text(), sweep)
        subprocess.run(["scontrol", "requeue", job.read_text()], check=True)
        wait(lambda: _queue("PENDING", job.read_text()) or log.read_text().count("$ crossft") == 2, sweep)
        subprocess.run(["scontrol", "update", f"JobId={job.read_text()}", "StartTime=now"], check=False)
        wait(lambda: not _queue(), sweep)
        assert log.read_text().count("$ crossft fit ") == 2, log.read_text()
        assert "stopped by SIGTERM at optimizer step 4, after saving" in log.read_text()
        sweep.finish()
    assert "18 runs: 18 finished, 0 failed, 0 in the queue, 0 submitted" in sweep.log.read_text()
    check(sweep, whole)


def _queue(*wanted: str) -> bool:
    """Whether the queue holds anything; or the job ``wanted[1]`` in state ``wanted[0]``."""
    states = [f"--states={wanted[0]}"] if wanted else []
    command = ["squeue", "--noheader", "--array", "--format=%i", *states]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return wanted[1] in found if wanted else bool(found)


def wait(condition: Callable[[], bool], sweep: Sweep) -> None:
    until = time.monotonic() + 2400
    while not condition():
        assert time.monotonic() < until, (sweep.log.read_text()[-2000:], sweep.statuses())
        time.sleep(0.5)
