"""The local executor over a stand-in of the command line: what is started, how often, and what is said of failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeps.sweeping import HERE, PROGRAM, Notes, planned, starts, sweep, write_sweep

from crossft.errors import ConfigError, Interrupted
from crossft.runs import RunFolder
from crossft.sweeps.local import Local
from crossft.sweeps.plan import Plan, Run
from crossft.sweeps.state import State, state_of

FOUR = {"arms": {"a": {"fake.gain": 0.1}, "b": {"fake.gain": 0.2}}, "seeds": 2}


def begin(file: Path, slots: int = 2, *flags: str) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, str(HERE / "sweeping.py"), str(file), str(slots), *flags])


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


def parents(plan: Plan) -> Counter[int]:
    """How many runs each sweep has started, by the sweep's process."""
    return Counter(int(line.split()[4]) for line in starts(plan, "fit"))


def states(plan: Plan) -> list[State]:
    return [state_of(run.folder) for run in plan.runs]


def test_every_run_is_started_once_and_a_second_sweep_starts_none(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, **FOUR))
    outcomes, notes = sweep(plan)
    assert [o.state for o in outcomes] == [State.FINISHED] * 4
    assert [o.run for o in outcomes] == list(plan.runs)
    assert Counter(line.split()[1] for line in starts(plan, "fit")) == {r.folder.path.name: 1 for r in plan.runs}
    assert len(notes.begun) == 4
    again, notes = sweep(plan)
    assert [o.state for o in again] == [State.FINISHED] * 4
    assert notes.begun == []
    assert len(starts(plan, "fit")) == 4


def test_cores_are_shared_out_over_the_slots(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path))
    sweep(plan, slots=2, threads=3)
    assert starts(plan, "fit")[0].split()[2] == "3"
    assert Local(plan, slots=10_000).threads == 1
    with pytest.raises(ConfigError, match="slots=0"):
        Local(plan, slots=0)


def test_killed_sweep_lets_its_runs_live_and_the_next_waits_for_them(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, **FOUR)
    plan = planned(file, "--fake.seconds=1.5")
    process = begin(file, 2, "--fake.seconds=1.5")
    wait(lambda: len(starts(plan, "fit")) == 2)
    process.kill()
    process.wait()
    beside: list[int] = []

    class Counting(Notes):
        def started(self, run: Run, slot: int, resumed: bool) -> None:
            super().started(run, slot, resumed)
            begun = {line.split()[1] for line in starts(plan, "fit")} - {run.folder.path.name}
            beside.append(sum(r.folder.path.name in begun and not state_of(r.folder).ended for r in plan.runs))

    notes = Counting()
    outcomes = Local(plan, 2, program=PROGRAM).run(notes)
    assert [o.state for o in outcomes] == [State.FINISHED] * 4
    assert len(notes.begun) == 2, "the runs of the killed sweep were started again"
    assert max(beside) <= 1, "more than 2 runs at a time, with those that outlived their sweep"
    assert Counter(line.split()[0] for line in starts(plan)) == {"fit": 4, "leg": 1}


def test_runs_killed_with_the_sweep_are_resumed(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"a": {"fake.seconds": 60, "fake.once": 1}, "b": {}}, seeds=2)
    plan = planned(file)
    process = begin(file)
    wait(lambda: sum("epoch" in run.log.read_text() for run in plan.runs if run.log.is_file()) == 2)  # past their leg
    process.kill()
    process.wait()
    for line in starts(plan, "fit"):
        os.kill(int(line.split()[3]), signal.SIGKILL)
    assert states(plan) == [State.UNFINISHED, State.UNFINISHED, State.MISSING, State.MISSING]
    outcomes, notes = sweep(plan)
    assert [o.state for o in outcomes] == [State.FINISHED] * 4
    # the order is not said: the lock of a killed run may be held for a moment longer
    assert sorted(resumed for _, resumed in notes.begun) == [False, False, True, True]
    assert Counter(line.split()[0] for line in starts(plan)) == {"fit": 4, "resume": 2, "leg": 1}


def test_two_sweeps_of_one_file_share_the_work(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, **{**FOUR, "seeds": 4})
    others = [begin(file, 1, "--fake.seconds=0.8") for _ in range(2)]
    assert [process.wait(60) for process in others] == [0, 0]
    plan = planned(file, "--fake.seconds=0.8")
    assert states(plan) == [State.FINISHED] * 8
    assert len(starts(plan, "fit")) == 8
    assert not starts(plan, "resume")
    assert min(parents(plan)[process.pid] for process in others) >= 2, "one of them did nearly all"


def test_run_of_a_living_sweep_takes_no_slot_and_is_taken_up_where_it_is_given_up(tmp_path: Path) -> None:
    arms = {"slow": {"fake.seconds": 60, "fake.once": 1}, "b": {"fake.gain": 0.1}, "c": {"fake.gain": 0.2}}
    file = write_sweep(tmp_path, arms=arms)
    plan = planned(file)
    log = plan.runs[0].log
    first = begin(file, 1)
    wait(lambda: log.is_file() and "epoch" in log.read_text())
    second = begin(file, 1)
    wait(lambda: states(plan) == [State.UNFINISHED, State.FINISHED, State.FINISHED])
    assert parents(plan) == {first.pid: 1, second.pid: 2}
    assert first.poll() is second.poll() is None, "the second waits for what the first still runs"
    assert not starts(plan, "resume")
    first.terminate()
    assert first.wait(30) != 0
    assert second.wait(30) == 0
    assert states(plan) == [State.FINISHED] * 3
    assert [line.split()[4] for line in starts(plan, "resume")] == [str(second.pid)]


def test_run_given_up_elsewhere_waits_for_a_free_slot(tmp_path: Path) -> None:
    slow = {"fake.seconds": 60, "fake.once": 1}
    file = write_sweep(tmp_path, arms={"a": slow, "b": {"fake.seconds": 4}})
    plan = planned(file)
    first = begin(file, 1)
    wait(lambda: plan.runs[0].log.is_file() and "epoch" in plan.runs[0].log.read_text())
    second = begin(file, 1)
    wait(lambda: plan.runs[1].log.is_file() and "epoch" in plan.runs[1].log.read_text())
    first.terminate()
    assert first.wait(30) != 0
    wait(lambda: bool(starts(plan, "resume")))
    assert states(plan)[1] is State.FINISHED, "two runs in one slot"
    assert second.wait(30) == 0
    assert states(plan) == [State.FINISHED] * 2


def test_sigterm_lets_the_runs_save_and_stop(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"a": {"fake.seconds": 60, "fake.once": 1}, "b": {"fake.gain": 0.1}})
    plan = planned(file)
    process = begin(file, 1)
    log = plan.runs[0].log
    wait(lambda: log.is_file() and "epoch" in log.read_text())
    time.sleep(0.2)
    process.terminate()
    assert process.wait(30) != 0
    assert plan.runs[0].folder.summary()["status"] == "interrupted"
    assert len(starts(plan, "fit")) == 1, "another run was started after the signal"
    outcomes, notes = sweep(plan)
    assert [o.state for o in outcomes] == [State.FINISHED] * 2
    assert notes.begun == [("a s0", True), ("b s0", False)]


def test_second_signal_kills_runs_that_do_not_stop(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"a": {"fake.seconds": 60, "fake.end": "deaf", "fake.once": 1}})
    plan = planned(file)
    process = begin(file, 1)
    wait(lambda: plan.runs[0].log.is_file() and "epoch" in plan.runs[0].log.read_text())
    time.sleep(0.2)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None, "it did not wait for its run"
    process.terminate()
    assert process.wait(30) != 0
    assert plan.runs[0].folder.summary()["error"] == "killed by SIGKILL"
    with pytest.raises(ProcessLookupError):
        os.kill(int(starts(plan, "fit")[0].split()[3]), 0)


def test_signal_in_this_process_is_an_interruption_and_handlers_come_back(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"a": {"fake.seconds": 60, "fake.once": 1}}))
    former = signal.getsignal(signal.SIGTERM)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"])
    with pytest.raises(Interrupted, match="1 runs are left"):
        sweep(plan)
    assert signal.getsignal(signal.SIGTERM) is former


FAILING = {
    "diverges": {"fake.end": "fail"},
    "silent": {"fake.end": "silent"},
    "early": {"fake.end": "early"},
    "killed": {"fake.end": "kill", "fake.once": 1},
    "good": {},
}


def test_failing_arms_are_listed_with_their_reason_and_stop_nobody(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms=FAILING))
    outcomes, _ = sweep(plan)
    found = {o.run.arm.name: (o.state, o.reason) for o in outcomes}
    assert found["diverges"] == (State.FAILED, "TrainingError: the loss is NaN at step 3")
    assert found["silent"] == (State.FAILED, "epoch 1/2  step 1 | MemoryError: too much")
    assert found["early"] == (State.FAILED, "data.root=nowhere: there is no such folder")
    assert found["killed"] == (State.UNFINISHED, "killed by SIGKILL")
    assert found["good"] == (State.FINISHED, "")
    summaries = {run.arm.name: run.folder.summary() for run in plan.runs}
    assert {name: s["status"] for name, s in summaries.items()} == {
        "diverges": "failed", "silent": "failed", "early": "failed", "killed": "interrupted", "good": "finished",
    }  # fmt: skip
    assert summaries["early"]["error"] == "data.root=nowhere: there is no such folder"
    assert (summaries["early"]["experiment"], summaries["early"]["arm"]) == ("small", "early")


def test_failed_runs_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms=FAILING))
    sweep(plan)
    again, notes = sweep(plan)
    assert [name for name, _ in notes.begun] == ["killed s0"]
    assert {o.run.arm.name: o.reason for o in again}["early"] == "data.root=nowhere: there is no such folder"
    retried, notes = sweep(plan, retry=True)
    assert dict(notes.begun) == {"diverges s0": True, "silent s0": True, "early s0": False}
    assert [o.state for o in retried].count(State.FAILED) == 3


def test_leftovers_of_a_run_that_died_before_it_began_are_cleared(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, **FOUR))
    first, second, third, _ = (run.folder for run in plan.runs)
    first.checkpoints.mkdir(parents=True)
    RunFolder.create(second.path, experiment="small", arm="a", seed=1)
    third.checkpoints.mkdir(parents=True)
    (third.checkpoints / "last.ckpt").write_text("")
    outcomes, _ = sweep(plan)
    assert [o.state for o in outcomes] == [State.FINISHED, State.FINISHED, State.FAILED, State.FINISHED]
    assert "holds checkpoints but no config.yaml" in outcomes[2].reason
    assert third.checkpoints.joinpath("last.ckpt").is_file()


def test_one_run_a_source_leg_goes_first_and_no_slot_waits_for_a_leg(tmp_path: Path) -> None:
    legs = [{"fake.leg": leg, "fake.source": 1.0 if leg == "x" else 0.0} for leg in "xxxyy"]
    arms = {f"a{i}": {**leg, "fake.gain": i} for i, leg in enumerate(legs)}
    plan = planned(write_sweep(tmp_path, arms=arms))
    assert plan.sources() == {"x-s0": 3, "y-s0": 2}
    outcomes, notes = sweep(plan, slots=2)
    assert [o.state for o in outcomes] == [State.FINISHED] * 5
    assert [name for name, _ in notes.begun] == ["a0 s0", "a3 s0", "a4 s0", "a1 s0", "a2 s0"]
    assert len(starts(plan, "leg")) == 2


def test_gpus_are_dealt_out(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, **FOUR))
    script = tmp_path / "print.py"
    script.write_text("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)")
    seen = []
    for gpus in ([0, 1, 2], [5]):
        local = Local(plan, 2, gpus=gpus, retry=True, program=[sys.executable, str(script)])
        outcomes = local.run(Notes())
        seen.append({o.reason for o in outcomes})
    assert seen == [{"0,2", "1"}, {"5"}]
