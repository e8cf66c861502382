"""The SLURM executor over stand-ins of sbatch, squeue and the command line; tests/cli/test_cluster.py has real ones."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sweeps.sweeping import PROGRAM, planned, starts, write_sweep
from sweeps.test_local import wait

from crossft.errors import ConfigError, RunError
from crossft.runs import RunFolder
from crossft.sweeps import slurm
from crossft.sweeps.locks import locked, orphaned
from crossft.sweeps.plan import Plan, Run
from crossft.sweeps.slurm import Element, Request, Submitted, submit, tasks
from crossft.sweeps.state import State, state_of

LEG = {"fake.leg": "x"}
ARMS = {"arms": {"a": {**LEG, "fake.gain": 0.1}, "b": LEG, "c": {}}, "seeds": 1}
SBATCH = """#!/bin/sh
number=$(( $(cat {0}/number) + 1 )); echo $number > {0}/number
cp "$1" {0}/job-$number.sh
echo "Submitted batch job $number"
"""


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the cluster: its commands, the jobs submitted, and (``queue``) those not ended."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", "#!/bin/sh\ncat {0}/queue\n"), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text.format(folder))
        (folder / name).chmod(0o755)
    (folder / "number").write_text("0")
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """An element sets handlers, in a process of its own; here they are put back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
    former = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def submitted(plan: Plan, **options: object) -> Submitted:
    return submit(plan, Request(), program=PROGRAM, **options)


def test_sources_go_first_and_what_is_done_or_queued_is_not_submitted(tmp_path: Path, queue: Path) -> None:
    plan = planned(write_sweep(tmp_path, **ARMS))
    a, b, c = (run.folder.path for run in plan.runs)
    done = submitted(plan)
    assert dict(done.submitted) == {a: "2_0", b: "2_1", c: "2_2"}
    assert done.sources == "1"
    first, second = ((queue / f"job-{n}.sh").read_text() for n in (1, 2))
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterany:1\n" in second
    assert "#SBATCH --array=0-2%3\n" in second
    assert "#SBATCH --requeue\n" in second
    assert "--time" not in second
    (queue / "queue").write_text("2_0\n2_2\n77\n")
    again = submitted(plan)
    assert dict(again.queued) == {a: "2_0", c: "2_2"}
    assert dict(again.submitted) == {b: "4"}, "one run is no array"
    (queue / "queue").write_text("")
    Element(plan.runs[0], 1, tuple(PROGRAM))()
    assert state_of(plan.runs[0].folder) is State.FINISHED
    last = submitted(plan)
    assert set(last.submitted) == {b, c}
    assert last.sources is None, "the source leg of a is known to be finished, and b shares it"
    assert last.states[a] is State.FINISHED


def test_an_element_starts_continues_and_passes_over(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"a": {"fake.end": "kill", "fake.once": 1}}))
    (run,) = plan.runs
    element = Element(run, 3, tuple(PROGRAM))
    with pytest.raises(RunError, match="a s0: unfinished: killed by SIGKILL"):
        element()
    assert state_of(run.folder) is State.UNFINISHED
    assert element() == "finished"
    assert element() == "finished"
    assert starts(plan)[0].split()[2] == "3", "threads"
    log = run.log.read_text()
    assert log.count("$ crossft fit ") == 3
    assert log.count("--run.resume=true") == 3


def test_a_failed_run_is_in_the_table_with_its_reason_and_not_submitted(tmp_path: Path, queue: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"bad": {"fake.end": "fail"}, "oom": {"fake.end": "silent"}}))
    for run, word in zip(plan.runs, ("NaN at step 3", "MemoryError")):
        with pytest.raises(RunError, match=word):
            Element(run, 1, tuple(PROGRAM))()
        assert word in RunFolder(run.folder.path).summary()["error"]
    assert not submitted(plan).submitted
    assert len(submitted(plan, retry=True).submitted) == 2


def test_a_run_that_another_process_has_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(write_sweep(tmp_path))
    (run,) = plan.runs
    monkeypatch.setattr(slurm, "_PATIENCE", 0.0)
    run.log.parent.mkdir(parents=True)
    assert locked(run.log.with_suffix(".lock")) is not None
    with pytest.raises(RunError, match="another process runs this"):
        Element(run, 1, tuple(PROGRAM))()
    assert not starts(plan)


@pytest.mark.parametrize(
    ("word", "asked"), [("USR1", "requeue 7_3\n"), ("USR2", "requeue 7_3\n"), ("TERM", ""), ("INT", "")]
)
def test_signal_ends_the_wait_for_a_lock_and_asks_for_a_requeue_as_the_run_would(
    word: str, asked: str, tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (queue / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {queue}/asked\n")
    (queue / "scontrol").chmod(0o755)
    (queue / "asked").write_text("")
    for name, value in (("JOB_ID", "9"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(slurm, "_PATIENCE", 20.0)
    (run,) = planned(write_sweep(tmp_path)).runs
    run.log.parent.mkdir(parents=True)
    assert locked(run.log.with_suffix(".lock")) is not None
    kills = f"sleep 0.5; kill -CONT {os.getpid()}; sleep 1.5; kill -{word} {os.getpid()}"
    sender = subprocess.Popen(["sh", "-c", kills])
    began = time.monotonic()
    with pytest.raises(RunError, match=f"base s0: stopped by SIG{word} before it began") as stop:
        Element(run, 1, tuple(PROGRAM))()
    assert time.monotonic() - began >= 2, "SIGCONT ended it"
    assert sender.wait() == 0
    assert (queue / "asked").read_text() == asked
    assert ("SLURM job 7_3 is requeued" in str(stop.value)) == bool(asked)


def test_run_of_a_killed_element_keeps_the_lock(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"a": {"fake.seconds": 60, "fake.once": 1}}))
    (run,) = plan.runs
    element = multiprocessing.get_context("spawn").Process(target=Element(run, 1, tuple(PROGRAM)))
    element.start()
    wait(lambda: run.log.is_file() and "epoch" in run.log.read_text())
    lock = run.log.with_suffix(".lock")
    assert locked(lock) is None
    assert not orphaned(lock)
    element.kill()
    element.join()
    assert locked(lock) is None, "a second process would write into the run's folder"
    assert orphaned(lock)
    os.kill(int(starts(plan)[0].split()[3]), signal.SIGKILL)
    wait(lambda: locked(lock) is not None)


def test_requests_reach_sbatch(tmp_path: Path, queue: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"a": {"fake.gain": 0.1}, "b": {}}))
    more = {"account": "me", "signal": "USR1@300", "exclusive": True}
    submit(plan, Request("long", "1-00:00:00", 4, 7, 1, more), program=PROGRAM)
    script = (queue / "job-1.sh").read_text()
    for line in (
        "partition=long", "time=1-00:00:00", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=7", "array=0-1%1",
        "account=me", "signal=USR1@300", "exclusive", "requeue", "job-name=small",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --{line}$", script, re.MULTILINE), line
    assert "--cpus-per-task=7" in next(line for line in script.splitlines() if line.startswith("srun"))


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, (1, 0, False)),
        ({"devices": "auto", "num_nodes": 2}, (2, 0, False)),
        ({"devices": 4, "accelerator": "gpu"}, (1, 4, True)),
        ({"devices": [0, 1]}, (1, 2, False)),
        ({"devices": "0,1,2"}, (1, 3, False)),
        ({"devices": -1}, (1, 0, False)),
    ],
)
def test_tasks_follow_the_trainer(trainer: dict[str, object], expected: tuple[int, int, bool]) -> None:
    run = Run(None, 0, RunFolder("x"), None, (), (), trainer)  # type: ignore[arg-type]
    assert tasks([run, run]) == expected
    other = Run(None, 0, RunFolder("y"), None, (), (), {"devices": 8})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sweep files of their own"):
        tasks([run, other])


def test_what_is_missing_is_named(tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(write_sweep(tmp_path))
    refused: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: (queue / "squeue").write_text("#!/bin/sh\necho no contact >&2; exit 1"), RunError, "squeue says: no"),
        (lambda: (queue / "squeue").write_text("#!/bin/sh\n"), RunError, "refuses the jobs: Invalid account"),
        (lambda: monkeypatch.setenv("PATH", str(tmp_path)), ConfigError, "SLURM's commands"),
        (lambda: monkeypatch.setitem(sys.modules, "submitit", None), ConfigError, r"pip install 'crossft\[slurm\]'"),
    ]
    (queue / "sbatch").write_text("#!/bin/sh\necho Invalid account >&2; exit 1")
    for change, kind, words in refused:
        change()
        with pytest.raises(kind, match=words):
            submitted(plan)
    assert not list(plan.root.glob("logs/*.job"))
