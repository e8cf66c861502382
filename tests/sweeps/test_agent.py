"""A sweep file in W&B's words, and the agent's arguments as a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweeps.sweeping import RESOLVE, planned, sweep, write_sweep
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from crossft.cli.agent import command_of
from crossft.errors import ConfigError
from crossft.runs import RunFolder
from crossft.sweeps.agent import asked_arm, read_asked, registration
from crossft.sweeps.file import read_sweep

ARMS = {"plain": {}, "l2sp": {"methods.l2sp": "L2SP", "methods.l2sp.alpha": 2}}
GRID: dict[str, Any] = {
    "arms": ARMS,
    "seeds": 2,
    "metric": {"name": "target/test/loss"},
    "parameters": {
        "methods.l2sp.weight": {"values": [0.1, 10]},
        "on": {"values": [True, False, None]},
        "depth": {"values": [1, 2], "when": {"on": True}},
        "fixed": {"value": 3},
    },
}


def written(folder: Path, **asked: Any) -> Path:
    """The file that wandb's agent writes for ``${args_json_file}``, by wandb's own code."""
    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in asked.items()}})
    file = folder / "args.json"
    file.write_text(made["args_json"][0])
    return file


def test_registration_is_wandbs_schema(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, **GRID)
    found = registration(read_sweep(file, ["--a.b=1"]), ["--a.b=1"], ["mine"])
    assert json.loads(json.dumps(found)) == found
    command = found.pop("command")
    assert create_sweep_command(command) == command
    assert command[-3:] == ["${args_json_file}", "--allow=mine", "--a.b=1"]
    assert command[:6] == ["${env}", "${interpreter}", "-m", "crossft.cli", "sweep", "agent"]
    assert found == {
        "name": "small",
        "method": "grid",
        "metric": {"name": "target/test/loss", "goal": "minimize"},
        "parameters": {
            "arm": {"values": ["plain", "l2sp"]},
            "seed_everything": {"values": [0, 1]},
            "methods.l2sp.weight": {"values": [0.1, 10]},
            "on": {"values": [True, False, None]},
            "depth": {"values": [1, 2]},
        },
    }


def test_search_is_registered_with_its_rule(tmp_path: Path) -> None:
    early = {"type": "hyperband", "max_iter": 27, "s": 2}
    parameters = {"lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 1}}
    keys = {"method": "bayes", "run_cap": 9, "metric": {"name": "target/val/accuracy"}, "parameters": parameters}
    found = registration(read_sweep(write_sweep(tmp_path, **keys, early_terminate=early)))
    assert found["early_terminate"] == {"type": "hyperband", "min_iter": 3, "eta": 3}
    assert (found["run_cap"], found["method"], found["parameters"]["lr"]) == (9, "bayes", parameters["lr"])
    with pytest.raises(ConfigError, match=r"seeds=\[0, 1\]: W&B's bayes search runs one seed a trial"):
        registration(read_sweep(write_sweep(tmp_path, **keys, seeds=2)))
    with pytest.raises(ConfigError, match="W&B has hyperband alone"):
        registration(read_sweep(write_sweep(tmp_path, **keys, early_terminate={"type": "median"})))


def test_agents_arguments_become_overrides(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, **GRID))
    asked = {"arm": "l2sp", "seed_everything": 1, "methods.l2sp.weight": 10, "on": True, "depth": 2}
    arm = asked_arm(sweep, read_asked(written(tmp_path, **asked)))
    assert arm.name == "l2sp,weight=10,on=true,depth=2"
    root = {"run.root": str(tmp_path / "runs"), "fixed": 3}
    l2sp = {"methods.l2sp": "L2SP", "methods.l2sp.alpha": 2, "methods.l2sp.weight": 10}
    assert dict(arm.overrides) == {**root, **l2sp, "on": True, "depth": 2}
    arm = asked_arm(sweep, read_asked(written(tmp_path, **{**asked, "arm": "plain", "on": None})))
    assert arm.name == "plain,on=null"
    assert dict(arm.overrides) == {**root, "on": None}


def test_agents_run_is_the_plans_run(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, arms=ARMS, seeds=2, parameters={"lr": {"values": [0.1, 0.01]}})
    plan = planned(file)
    asked = {"arm": "l2sp", "seed_everything": 1, "lr": 0.01}
    (run,) = [r for r in plan.runs if r.arm.name == "l2sp,lr=0.01" and r.seed == 1]
    for done in ("missing", "finished", "unfinished"):
        words, folder, lock = command_of(plan.sweep, asked, program=RESOLVE)
        lock.release()
        assert folder.path == run.folder.path
        if done == "missing":
            assert words == ["fit", *run.flags]
            sweep(plan)
        elif done == "finished":
            assert words == []
            RunFolder(folder.path).write_summary(status="running")
        else:
            assert words == ["resume", str(folder.path)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"arm": "l2sp"}, "holds no arm and seed_everything"),
        ({"arm": "other", "seed_everything": 0}, "asks for the arm 'other'; the file has plain, l2sp"),
        ({"arm": "plain", "seed_everything": 0, "lr": 1}, "asks for 'lr', which is no parameter of the file"),
    ],
)
def test_arguments_that_do_not_fit_the_file_are_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    found = read_sweep(write_sweep(tmp_path, **GRID))
    with pytest.raises(ConfigError, match=message):
        asked_arm(found, read_asked(written(tmp_path, **asked)))
