"""W&B runs, read back from their offline files with wandb's own reader; and ``wandb agent`` that starts a run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.cli.tracking import class_rows
from crossft.runs import RunFolder

Fit = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ["--wandb.mode=auto", "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def offline(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def records(run: Path) -> list[dict[str, Any]]:
    """Every record of an offline run, by ``wandb leet inspect``."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", str(run), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(found: list[dict[str, Any]], kind: str, part: str = "update") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in found:
        if record["type"] == kind:
            values |= record[kind].get(part) or {}
    return values


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Undo the reader's dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = found
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return found


@pytest.fixture(scope="module")
def tracked(finished: Path, fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from a finished one and selects a checkpoint, and then one that crashes, in one process."""
    root = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(root / "no-netrc"))
        start = f"--init={finished}"
        assert fit(root, *OFFLINE, start, "--select=source/val/accuracy", "--arm=whole", f"--run.dir={root}/whole") == 0
        crash = ["--trainer.callbacks=crashing.Crash", "--allow=crashing", "--checkpoints.every_n_steps=1"]
        with pytest.raises(ZeroDivisionError):
            fit(root, *OFFLINE, start, *crash, "--arm=crash", f"--run.dir={root}/crash")
    return root


def test_every_metric_of_the_summary_is_a_plain_number_of_the_run(tracked: Path) -> None:
    folder = RunFolder(tracked / "whole")
    (run,) = offline(folder.path)
    found = nested(merged(records(run), "summary"))
    summary = folder.summary()
    metrics = summary.pop("metrics")
    assert {"target/val/accuracy", "target/test/accuracy", "source/retention", "target/gain"} <= set(metrics)
    assert {key: found.get(key) for key in metrics} == {
        key: pytest.approx(v) if v is not None else None for key, v in metrics.items()
    }
    assert {key: found["crossft"].get(key) for key in summary} == summary


def test_run_is_found_by_config_group_job_and_tags(tracked: Path) -> None:
    folder = RunFolder(tracked / "whole")
    (run,) = offline(folder.path)
    found = [record["run"] for record in records(run) if record["type"] == "run"]
    first = found[0]
    assert first["run_id"] == folder.summary()["wandb_id"] == run.name.rpartition("-")[2]
    assert (first["project"], first["run_group"], first["job_type"]) == ("crossft", "tiny", "fit")
    assert first["tags"] == ["whole", "photo", "sketch", "freeze", "l2sp"]
    config = yaml.safe_load(folder.config.read_text())
    logged = first["config"]["update"]
    assert {key: logged[key] for key in config if key != "model"} == {k: v for k, v in config.items() if k != "model"}
    assert logged["model"]["class_path"] == config["model"]["class_path"]


def test_tables_hold_ledger_confusions_and_classes(tracked: Path) -> None:
    folder = RunFolder(tracked / "whole")
    (run,) = offline(folder.path)
    files = {path.relative_to(run / "files" / "media" / "table"): path for path in run.rglob("*.table.json")}
    tables = {
        str(name).rpartition("_")[0].rpartition("_")[0]: json.loads(path.read_text()) for name, path in files.items()
    }
    assert set(tables) == {"ledger"} | {
        f"{kind}/{name}" for kind in ("confusion", "classes") for name in ("photo", "sketch")
    }
    ledger = list(csv.reader(folder.ledger.open()))
    assert tables["ledger"]["columns"] == ledger[0]
    assert [[str(row[2]), float(row[3])] for row in tables["ledger"]["data"]] == [
        [r[2], float(r[3])] for r in ledger[1:]
    ]
    confusion = list(csv.reader((folder.path / "confusion" / "sketch.csv").open()))
    assert tables["confusion/sketch"]["data"] == [[row[0], *map(int, row[1:])] for row in confusion[1:]]
    hits = sum(int(row[index]) for index, row in enumerate(confusion[1:], 1))
    rows = sum(int(value) for row in confusion[1:] for value in row[1:])
    assert hits / rows == pytest.approx(folder.summary()["metrics"]["target/test/accuracy"])
    assert sum(row[1] for row in tables["classes/sketch"]["data"]) == rows


def test_class_scores_are_those_of_the_counts() -> None:
    assert class_rows(["true", "a", "b"], [["a", 3, 1], ["b", 2, 4]]) == [
        ["a", 4, 3 / 5, 3 / 4, 2 * 3 / (4 + 5)],
        ["b", 6, 4 / 5, 4 / 6, 2 * 4 / (6 + 5)],
    ]
    assert class_rows(["true", "a", "b"], [["a", 2, 0], ["b", 0, 0]])[1] == ["b", 0, None, None, None]
    assert class_rows(["label", "tn", "fp", "fn", "tp"], [["a", 5, 1, 2, 3]]) == [["a", 5, 3 / 4, 3 / 5, 6 / 9]]


def artifacts(run: Path) -> list[dict[str, Any]]:
    return [
        record["artifact"]
        for record in records(run)
        if record["type"] == "artifact" and record["artifact"]["type"] != "run_table"
    ]


def test_artifacts_name_data_parent_and_checkpoints_also_of_a_crash(tracked: Path, finished: Path) -> None:
    for name in ("whole", "crash"):
        folder = RunFolder(tracked / name)
        (run,) = offline(folder.path)
        data, parent, *own = artifacts(run)
        assert (data["type"], parent["type"]) == ("dataset", "model")
        assert data["use_after_commit"] is parent["use_after_commit"] is True
        assert parent["name"] == f"tiny-{finished.name}"
        assert not any(artifact.get("use_after_commit") for artifact in own)
        aliases = {alias for artifact in own for alias in artifact["aliases"]} - {"latest"}
        assert aliases == ({"last", "best"} if name == "whole" else {"last"})
        assert {artifact["name"] for artifact in own} == {f"tiny-{name}"}
        assert str(folder.checkpoints) in json.dumps(own), "a checkpoint is referred to by its place"
        ends = [record["exit"].get("exit_code", 0) for record in records(run) if record["type"] == "exit"]
        assert ends == [0 if name == "whole" else 1]
    same = [artifacts(offline(tracked / name)[0])[0] for name in ("whole", "crash")]
    assert same[0]["digest"] == same[1]["digest"], "runs on the same data meet in one artifact"
    assert same[0]["name"] == same[1]["name"]
    assert RunFolder(tracked / "crash").summary()["status"] == "failed"
    import wandb

    assert wandb.run is None, "the run was not finished"


def test_a_run_that_fails_before_it_trains_tells_why(fit: Fit, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    early = ["--source_leg=null", "--model.backbone.weights=missing.pth", f"--run.dir={folder.path}"]
    assert fit(tmp_path, *OFFLINE, *early) == 1
    (run,) = offline(folder.path)
    found = records(run)
    (begun,) = [record["run"] for record in found if record["type"] == "run"][:1]
    assert begun["run_id"] == folder.summary()["wandb_id"]
    assert (begun["run_group"], begun["tags"][:2]) == ("tiny", ["default", "photo"])
    told = nested(merged(found, "summary"))["crossft"]
    assert told["status"] == "failed"
    assert "weights='missing.pth' is no file" in told["error"]
    assert [record["exit"]["exit_code"] for record in found if record["type"] == "exit"] == [1]


def test_resumed_run_goes_on_under_the_id_of_its_checkpoint(
    finished: Path, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setenv("STOP_IN", "target")
    monkeypatch.setenv("STOP_AT", "1")
    stop = ["--trainer.callbacks=interrupting.StopAt", "--allow=interrupting"]
    assert fit(tmp_path, *OFFLINE, *stop, f"--init={finished}", f"--run.dir={folder.path}") == 143
    run_id = folder.summary()["wandb_id"]
    callbacks = load_checkpoint(folder.last)["callbacks"]
    assert callbacks["Checkpoints"]["wandb_id"] == run_id
    folder.write_summary(wandb_id=None)
    monkeypatch.setenv("STOP_AT", "")
    time.sleep(1)  # W&B names the folders of a run by the second
    assert main(["resume", str(folder.path), "--allow=interrupting"]) == 0
    runs = offline(folder.path)
    assert len(runs) == 2
    assert {run.name.rpartition("-")[2] for run in runs} == {run_id}
    assert "preempting" in {record["type"] for record in records(runs[0])}


@pytest.fixture
def study(config: Path, images: Path, tmp_path: Path) -> Path:
    fixed = {"data.root": str(images), "data.source": "photo", "data.target": "sketch", "run.root": str(tmp_path)}
    fixed |= {"trainer.max_epochs": 1, "wandb.mode": "offline", "methods.freeze": None}
    parameters: dict[str, Any] = {key: {"value": value} for key, value in fixed.items()}
    parameters |= {"methods.l2sp.weight": {"values": [0.1, 1.0], "arms": ["pulled"]}}
    arms = {"pulled": {}, "free": {"methods.l2sp": None}}
    content = {"config": str(config), "arms": arms, "seeds": 2, "parameters": parameters}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**content, "metric": {"name": "target/val/accuracy"}}))
    return file


def test_registering_without_a_key_says_what_to_do(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "wandb", str(study)]) == 2
    error = capsys.readouterr().err
    assert "log in with `wandb login`, or set WANDB_API_KEY" in error
    assert f"crossft sweep run {study}" in error


def test_wandbs_agent_runs_what_the_file_says(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own code writes the arguments and starts the process; only its server is not there."""
    from wandb.wandb_agent import Agent

    from crossft.sweeps.agent import registration
    from crossft.sweeps.file import read_sweep

    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb" / "sweep-abcd1234").mkdir(parents=True)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = registration(read_sweep(study))["command"]
    agent = Agent.__new__(Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = command, None, False
    agent._forward_signals, agent._run_processes = False, {}
    asked = {"arm": "pulled", "seed_everything": 1, "methods.l2sp.weight": 1.0}
    agent._command_run(
        {"type": "run", "run_id": "r1", "program": None, "args": {key: {"value": v} for key, v in asked.items()}}
    )
    process = agent._run_processes["r1"]
    assert process.wait() == 0
    (folder,) = (RunFolder(path) for path in (tmp_path / "study").glob("pulled-weight=1-s1-*"))
    assert folder.summary()["status"] == "finished"
    config = yaml.safe_load(folder.config.read_text())
    assert (list(config["methods"]), config["seed_everything"]) == (["l2sp"], 1)
    assert config["methods"]["l2sp"]["init_args"]["weight"] == 1.0
    assert folder.summary()["wandb_id"] == "r1"
    (run,) = offline(folder.path)
    assert run.name.endswith("-r1")
    assert not list((tmp_path / "study").glob("source-*/wandb/*")), "the source leg took the agent's run"
