"""The plan: folders, refused arms, differences, cost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sweeps.sweeping import RESOLVE, planned, sweep, write_sweep

from crossft.errors import ConfigError, RunError
from crossft.sweeps.file import read_sweep
from crossft.sweeps.plan import difference, make_plan

ARMS = {"a": {"fake.leg": "x"}, "b": {"fake.leg": "x", "c": 2}}


def test_runs_have_computed_folders_that_follow_the_config(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms=ARMS, seeds=[3, 5]))
    names = [run.folder.path.name for run in plan.runs]
    assert [name.rpartition("-")[0] for name in names] == ["a-s3", "a-s5", "b-s3", "b-s5"]
    assert {run.folder.path.parent for run in plan.runs} == {tmp_path / "runs" / "small"}
    assert names == [run.folder.path.name for run in planned(plan.sweep.path).runs]
    other = planned(plan.sweep.path, "--lr=3")
    assert not set(names) & {run.folder.path.name for run in other.runs}, "other settings are other runs"
    assert f"--run.dir={plan.runs[0].folder.path}" in plan.runs[0].flags
    assert {"--arm=a", "--experiment=small", "--seed_everything=3"} <= set(plan.runs[0].flags)


def test_every_refused_arm_is_named_with_its_error(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"good": {}, "wrong": {"bad": 1}, "worse": {"bad": 2}})
    with pytest.raises(ConfigError) as caught:
        planned(file)
    assert "2 of 3 arms are refused\narm wrong: bad=1 is refused\narm worse: bad=2 is refused" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_arms_that_are_the_same_run_are_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"text": {"c": "2"}, "number": {"c": 2}})
    with pytest.raises(ConfigError, match="arms text and number are the same run"):
        planned(file)


def test_failure_of_the_check_itself_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not be checked: no such thing"):
        make_plan(read_sweep(write_sweep(tmp_path)), program=[sys.executable, "-c", "exit('no such thing')"])


def test_allowed_packages_reach_fit_and_resume(tmp_path: Path) -> None:
    plan = make_plan(read_sweep(write_sweep(tmp_path)), ["mine"], RESOLVE)
    assert "--allow=mine" in plan.runs[0].flags
    assert plan.runs[0].allow == ("--allow=mine",)


def test_difference_shows_changed_values_and_whole_new_objects() -> None:
    base = {"arm": "x", "methods": {}, "model": {"class_path": "a.B", "init_args": {"lr": 1, "deep": {"k": 1}}}}
    other = {
        "arm": "y",
        "methods": {"ewc": {"class_path": "crossft.callbacks.EWC", "init_args": {"weight": 2.0, "kind": None}}},
        "model": {"class_path": "a.B", "init_args": {"lr": 3, "deep": {"k": [1]}}},
    }
    assert difference(base, other) == ("methods.ewc=EWC(weight=2.0, kind=null)", "model.lr=3", "model.deep.k=[1]")
    assert difference(other, base)[0] == "methods.ewc=null"
    assert difference(base, {**base, "arm": "z"}) == ()


def test_plan_says_what_the_base_is(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms={"one": {"c": 1}, "two": {"c": 2, "bad": ""}}, parameters={"bad": {"value": 1}})
    file.write_text(file.read_text().replace("c: 1", "c: 1\n    bad: ''"))
    plan = planned(file)
    assert plan.base == "one"
    assert plan.differences == {"one": (), "two": ("c=2",)}


def test_baseline_is_as_named_or_the_arm_with_all_methods(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, leave_one_out="methods")
    (tmp_path / "base.yaml").write_text("methods: {ewc: {class_path: E}, dann: {class_path: D}}")
    assert planned(file).baseline == "all"
    file.write_text(file.read_text() + "baseline: no-ewc\n")
    assert planned(file).baseline == "no-ewc"


def test_cost_is_that_of_finished_siblings(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"a": {"fake.leg": "x"}, "b": {"fake.leg": "y"}}, seeds=2))
    assert plan.seconds_left() is None
    sweep(plan)
    assert plan.seconds_left() == 0.0
    for run in plan.runs[1:]:
        run.folder.write_summary(status="interrupted")
    plan.runs[0].folder.write_summary(seconds=10.0)
    assert plan.seconds_left() == 10.0 * 3 + 3.0, "three runs as the finished one, and the leg of b"
