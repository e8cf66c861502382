"""The search over a stand-in of the command line: what Optuna is told, and that a killed search goes its way."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sweeps.sweeping import RESOLVE, search, starts, write_sweep
from sweeps.test_local import begin, wait

from crossft.cli.sweep import report
from crossft.cli.trials import print_best, print_search
from crossft.errors import ConfigError, RunError
from crossft.sweeps.early import EarlyTerminate
from crossft.sweeps.file import read_sweep
from crossft.sweeps.search import Search, SearchPlan, make_search
from crossft.sweeps.state import State, state_of
from crossft.sweeps.study import TrialReports, TrialStudy, check_optuna

BAYES: dict[str, Any] = {"method": "bayes", "metric": {"name": "target/val/accuracy"}, "run_cap": 6}
X = {"fake.x": {"min": 0.0, "max": 1.0}}


def trials(plan: SearchPlan, index: int = 0) -> list[Any]:
    return plan.study(plan.spaces[index]).trials()


def test_search_is_told_every_trial_and_finds_the_best(tmp_path: Path) -> None:
    plan, notes = search(write_sweep(tmp_path, **{**BAYES, "run_cap": 18}, parameters=X))
    told = trials(plan)
    assert [t.state.name for t in told] == ["COMPLETE"] * 18
    assert len(notes.begun) == 18
    for trial in told:
        assert trial.value == pytest.approx(0.5 - (float(f"{trial.params['fake.x']:.6g}") - 0.3) ** 2, abs=1e-9)
    assert max(t.value for t in told) > 0.499


def test_killed_search_continues_to_the_same_trials(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    flags = ["--fake.seconds=0.5", "--fake.once=1"]
    whole, _ = search(write_sweep(tmp_path / "whole", **BAYES, parameters=X), 1, *flags)
    file = write_sweep(tmp_path / "killed", **BAYES, parameters=X)
    process = begin(file, 1, *flags)
    plan = make_search(read_sweep(file, flags), program=RESOLVE)
    wait(lambda: len(starts(plan, "fit")) == 3, 90)
    process.kill()
    process.wait()
    with suppress(ProcessLookupError):
        os.kill(int(starts(plan, "fit")[2].split()[3]), signal.SIGKILL)
    assert [t.state.name for t in trials(plan)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    _, notes = search(file, 1, *flags)
    assert [resumed for _, resumed in notes.begun] in ([True, False, False, False], [False] * 4)
    assert [(t.number, t.params, t.value) for t in trials(plan)] == [
        (t.number, t.params, t.value) for t in trials(whole)
    ]
    again, notes = search(file, 1, *flags)
    assert notes.begun == []
    assert len(trials(again)) == 6


def test_more_trials_continue_the_study_and_another_space_is_another_one(tmp_path: Path) -> None:
    few, _ = search(write_sweep(tmp_path, **{**BAYES, "run_cap": 3}, parameters=X))
    former = [t.params for t in trials(few)]
    more, notes = search(write_sweep(tmp_path, **{**BAYES, "run_cap": 5}, parameters=X))
    assert len(notes.begun) == 2
    assert [t.params for t in trials(more)][:3] == former
    other, notes = search(
        write_sweep(tmp_path, **{**BAYES, "run_cap": 2}, parameters={"fake.x": {"min": 0.0, "max": 2.0}})
    )
    assert len(notes.begun) == 2
    assert other.file == more.file


def test_value_is_the_mean_over_seeds_and_tasks(tmp_path: Path) -> None:
    tasks = {"data.source": {"value": "photo"}, "data.target": {"values": ["sketch", "cartoon", "photo"]}}
    plan, notes = search(write_sweep(tmp_path, **{**BAYES, "run_cap": 2}, seeds=3, parameters={**X, **tasks}), slots=4)
    assert len(notes.begun) == 2 * 3 * 2
    for trial in trials(plan):
        assert trial.value == pytest.approx(0.51 - (float(f"{trial.params['fake.x']:.6g}") - 0.3) ** 2)
    assert {run.arm.place for run in plan.plan().runs} == {"sketch", "cartoon"}


def test_failed_trial_is_told_and_its_values_are_tried_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"fake.end": {"values": ["finish", "fail"]}, "fake.once": {"value": 1}}
    plan, _ = search(write_sweep(tmp_path, **BAYES, seeds=2, parameters={**X, **ends}))
    told = trials(plan)
    failed = [t for t in told if t.state.name == "FAIL"]
    assert 0 < len(failed) < 6
    for trial in told:
        assert (trial.params["fake.end"] == "fail") == (trial in failed)
    assert {t.user_attrs["error"] for t in failed} == {"TrainingError: the loss is NaN at step 3"}
    runs = [run for run in plan.plan().runs if state_of(run.folder) is State.FAILED]
    assert len(runs) == len(failed), "the second seed of a failed trial was started"
    report(plan.plan())
    print_best(plan)
    printed = capsys.readouterr().out
    assert f"base: 6 trials: {6 - len(failed)} complete, {len(failed)} fail" in printed
    assert "0, 1 failed" in (plan.root / "comparison.md").read_text()
    for begun, state in (([True, False], "FAIL"), ([True], "COMPLETE"), ([], "COMPLETE")):
        plan, notes = search(plan.sweep.path, retry=True)
        assert [resumed for _, resumed in notes.begun] == begun * len(failed)
        again = trials(plan)[6:][-len(failed) :]
        assert [(t.state.name, t.params) for t in again] == [(state, t.params) for t in failed]
        assert plan.study(plan.spaces[0]).asked == 6


def test_hyperband_ends_trials_early_and_leaves_their_other_seeds_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    plan, _ = search(write_sweep(tmp_path, **BAYES, seeds=2, early_terminate=early, parameters=X))
    told = trials(plan)
    best: list[float] = []
    for trial in told:
        value = trial.intermediate_values[1]
        goes_on = value >= sorted([*best, value])[-max(1, (len(best) + 1) // 2)]
        best.append(value)
        if not goes_on:
            assert (trial.state.name, list(trial.intermediate_values)) == ("PRUNED", [1])
    pruned = [t for t in told if t.state.name == "PRUNED"]
    assert 0 < len(pruned) < 6
    summaries = [run.folder.summary() for run in plan.plan().runs]
    assert sum(s["status"] == "pruned" for s in summaries) == len(pruned)
    assert len(summaries) == 2 * 6 - len(pruned)
    report(plan.plan())
    print_best(plan)
    assert f"{len(pruned)} pruned" in capsys.readouterr().out
    assert "| 0, 1 pruned |" in (plan.root / "comparison.md").read_text()


def test_a_study_takes_no_run_that_another_one_ended_early_or_that_lacks_its_metric(tmp_path: Path) -> None:
    early = {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    values = {"fake.x": {"values": [0.3, 0.9, 1.2]}}
    first, _ = search(write_sweep(tmp_path, **BAYES, **early, parameters=values))
    assert "PRUNED" in {t.state.name for t in trials(first)}
    wider = {"fake.x": {"values": [0.3, 0.9, 1.2, 2.0]}}
    other_metric = {**BAYES, "metric": {"name": "target/val/f1"}}
    for keys, given in (({**BAYES, **early}, wider), (BAYES, values), (other_metric, values)):
        plan, notes = search(write_sweep(tmp_path, **keys, parameters=given))
        told = trials(plan)
        assert len(notes.begun) == len({t.params["fake.x"] for t in told})
        if "early_terminate" not in keys:
            assert [(t.state.name, t.user_attrs) for t in told] == [("COMPLETE", {})] * 6
    plan, notes = search(write_sweep(tmp_path, **BAYES, seeds=2, parameters=values))
    tried = len({t.params["fake.x"] for t in trials(plan)})
    assert tried <= len(notes.begun) < 2 * tried, "runs by the same metric that came to their end are shared"


def test_a_search_is_not_asked_ahead_of_its_results(tmp_path: Path) -> None:
    """Two values and three slots: a trial of a value that is just being run waits in a slot like any other."""
    file = write_sweep(tmp_path, **{**BAYES, "run_cap": 8}, parameters={"fake.x": {"values": [0.3, 0.9]}})
    told = trials(search(file, 3, "--fake.seconds=1.5")[0])
    assert len(told) == 8
    for one in told:
        open_then = [t for t in told if t.datetime_start <= one.datetime_start < t.datetime_complete]
        assert len(open_then) <= 3 + 1, "one may be over already and just not looked at again"


@pytest.mark.parametrize(
    ("early", "ends"),
    [
        (EarlyTerminate("hyperband", 2, 2), [2, 2, 0, 4]),
        (EarlyTerminate("median", 3, min_trials=1), [3, 3, 0, 3]),
    ],
)
def test_reports_end_a_trial_where_its_rule_says(tmp_path: Path, early: EarlyTerminate, ends: list[int]) -> None:
    study = TrialStudy(tmp_path / "search.db", "s", True, 9, early)
    curves = {"first": [0.3, 0.3, 0.3, 0.3, 0.3], "a": [0.1] * 5, "b": [0.2] * 5, "c": [0.9] * 5, "d": [0.5] * 5}
    found = []
    for name, curve in curves.items():
        trial = study.ask()
        reports = TrialReports(study.file, "s", trial.number, early)
        ended = next((i for i, value in enumerate(curve, 1) if reports.worse(i, value)), 0)
        study.tell(trial.number, "PRUNED" if ended else "COMPLETE", None if ended else curve[-1])
        found += [ended] if name != "first" else []
    assert found == ends


def test_resumed_run_does_not_report_twice_and_a_lost_storage_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = EarlyTerminate("hyperband", 1)
    study = TrialStudy(tmp_path / "search.db", "s", True, 9, early)
    number = study.ask().number
    for iteration in (1, 2, 3):
        assert not TrialReports(study.file, "s", number, early).worse(iteration, 0.1 * iteration)
    resumed = TrialReports(study.file, "s", number, early)
    assert [resumed.worse(i, 0.7) for i in (2, 3, 4)] == [False] * 3
    assert study.trials()[0].intermediate_values == {1: 0.1, 2: 0.2, 3: pytest.approx(0.3), 4: 0.7}
    assert not TrialReports(tmp_path / "lost.db", "s", 0, early).worse(1, 0.1)
    assert "lost.db is missing" in capsys.readouterr().err


def test_arms_are_searched_alike_each_with_the_parameters_that_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"plain": {}, "l2sp": {"methods.l2sp": "L2SP"}}
    parameters = {
        **X,
        "optimizer": {"values": ["adam", "sgd"]},
        "momentum": {"min": 0.0, "max": 0.9, "when": {"optimizer": "sgd"}},
        "methods.l2sp.weight": {"distribution": "log_uniform_values", "min": 0.01, "max": 100},
        "depth": {"min": 1, "max": 3},
        "width": {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8},
    }
    plan, _ = search(write_sweep(tmp_path, **BAYES, arms=arms, parameters=parameters), slots=2)
    assert [len(trials(plan, i)) for i in (0, 1)] == [6, 6]
    flags = {run.name: " ".join(run.flags) for run in plan.plan().runs}
    assert len(flags) == 12
    for name, line in flags.items():
        assert ("--methods.l2sp.weight=" in line) == name.startswith("l2sp,")
        assert ("--momentum=" in line) == ("--optimizer=sgd" in line)
    assert len({("--optimizer=sgd" in line) for line in flags.values()}) == 2
    for index, name in enumerate(("plain", "l2sp")):
        for trial in trials(plan, index):
            values = plan.known(plan.spaces[index], trial)
            assert values["depth"] in (1, 2, 3)
            assert values["width"] in range(8, 65, 8)
            assert ("methods.l2sp.weight" in values) == (name == "l2sp")
    print_search(plan, 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "momentum: uniform min=0 max=0.9, where optimizer is sgd" in printed
    assert "2 arms x 6 trials x 1 seeds" in printed
    assert "left to do: 0 trials" in printed


def test_plan_of_a_search_makes_nothing_and_knows_its_cost_after_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path, **BAYES, seeds=2, parameters=X)
    plan = make_search(read_sweep(file), program=RESOLVE)
    print_search(plan, 1)
    assert not plan.root.exists()
    assert "6 trials, unknown until a run has finished, or --measure" in capsys.readouterr().out
    search(write_sweep(tmp_path, **{**BAYES, "run_cap": 2}, seeds=2, parameters=X))
    print_search(plan, 2)
    assert "4 trials, at most 16 s of runs, about 8 s with 2 at a time" in capsys.readouterr().out


def test_values_that_a_config_refuses_are_named_before_any_run(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, **BAYES, parameters={**X, "bad": {"values": ["", "worse"]}})
    with pytest.raises(ConfigError, match=r"arm x=\d,bad=worse: bad=worse is refused"):
        make_search(read_sweep(file), program=RESOLVE)


def test_one_process_searches_an_experiment_at_a_time(tmp_path: Path) -> None:
    plan = make_search(read_sweep(write_sweep(tmp_path, **BAYES, parameters=X)), program=RESOLVE)
    first = Search(plan)
    with pytest.raises(RunError, match="another process searches"):
        Search(plan)
    first.close()
    Search(plan).close()


def test_damaged_storage_is_named(tmp_path: Path) -> None:
    plan = make_search(read_sweep(write_sweep(tmp_path, **BAYES, parameters=X)), program=RESOLVE)
    plan.root.mkdir(parents=True)
    plan.file.write_bytes(b"no database" * 100)
    with pytest.raises(RunError, match=r"search\.db: the search's storage cannot be used"):
        Search(plan)


def test_search_without_optuna_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install crossft\[search\]"):
        check_optuna()
    with pytest.raises(ConfigError, match="method: bayes needs Optuna"):
        make_search(read_sweep(write_sweep(tmp_path, **BAYES, parameters=X)), program=RESOLVE)


def test_stopped_search_goes_on(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, **{**BAYES, "run_cap": 2}, parameters={**X, "fake.once": {"value": 1}})
    plan = make_search(read_sweep(file, ["--fake.seconds=60"]), program=RESOLVE)
    process = begin(file, 1, "--fake.seconds=60")
    wait(lambda: any("epoch" in log.read_text() for log in plan.root.glob("logs/*.log")), 90)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(30) != 0
    assert [t.state.name for t in trials(plan)] == ["RUNNING"]
    (run,) = plan.plan().runs
    assert run.folder.summary()["status"] == "interrupted"
