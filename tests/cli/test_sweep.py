"""``crossft sweep`` with the real command line: two arms, two seeds, killed once and gone on with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crossft.cli import main
from crossft.runs import RunFolder

DEPTH = "methods.freeze.train_last"


@pytest.fixture(scope="module")
def study(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep file over the tiny config: two depths, two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    fixed = {"data.root": str(images), "data.source": "photo", "data.target": "sketch", "run.root": str(folder)}
    fixed |= {"data.shots": 3, "trainer.max_epochs": 1, "methods.freeze.train_last": 2}
    parameters = {key: {"value": value} for key, value in fixed.items()}
    parameters |= {DEPTH: {"values": [0, 2]}}
    file = folder / "study.yaml"
    metric = {"name": "target/test/accuracy", "goal": "maximize"}
    content = {"config": str(config), "seeds": 2, "metric": metric, "parameters": parameters}
    file.write_text(yaml.safe_dump(content))
    return file


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_killed_sweep_finishes_every_run_once(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = study.parent / "study"
    process = subprocess.Popen([sys.executable, "-m", "crossft.cli", "sweep", "run", str(study), "--slots=2"])
    while not list(root.glob("train_last=*/config.yaml")):
        assert process.poll() is None
        time.sleep(0.1)
    victim, *_ = children(process)
    process.kill()
    os.kill(victim, signal.SIGKILL)
    process.wait()
    assert main(["sweep", "run", str(study), "--slots=2"]) == 0
    printed = capsys.readouterr().out
    runs = sorted(root.glob("train_last=*"))
    assert len(runs) == 4
    assert {RunFolder(run).summary()["status"] for run in runs} == {"finished"}
    sources = [RunFolder(path) for path in root.glob("source-*")]
    assert len(sources) == 2, "a source leg a seed, shared by its two arms"
    assert {RunFolder(run).summary()["parent"] for run in runs} == {str(source.path) for source in sources}
    logs = {run.name: (root / "logs" / f"{run.name}.log").read_text() for run in runs}
    starts = {name: (log.count("$ crossft fit "), log.count("$ crossft resume ")) for name, log in logs.items()}
    assert sum(fits + resumes for fits, resumes in starts.values()) <= 5, starts
    assert all(1 <= fits + resumes <= 2 for fits, resumes in starts.values())
    assert sum(log.count("source: fitting") for log in logs.values()) <= 3
    assert "best mean of target/test/accuracy, without a test: train_last=" in printed
    for name in ("comparison.html", "comparison.md", "comparison.csv", "tradeoff.png"):
        assert (root / name).stat().st_size > 100, name
    assert "train_last=2" in (root / "comparison.md").read_text()


def test_plan_measures_what_a_sweep_costs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the sweep that the test above ran: the same runs under another name, none of which has finished."""
    other = study.with_name("other.yaml")
    other.write_text(study.read_text())
    assert main(["sweep", "plan", str(other), "--measure"]) == 0
    printed = capsys.readouterr().out
    minutes, seconds = re.search(r"left to do: (?:(\d+) min )?(\d+) s of runs", printed).groups()
    expected = 60 * int(minutes or 0) + int(seconds)
    assert expected > 0
    assert not (study.parent / "other").exists()


def test_bad_arm_is_refused_by_name_before_any_starts(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = study.with_name("bad.yaml")
    content = yaml.safe_load(study.read_text())
    arms = {"good": {}, "typo": {"methods.l2sp.wieght": 1}, "minus": {"data.batch_size": -1}}
    arms |= {"model": {"model.backbone.name": "nonsense_net"}, "domain": {"data.eval": "nowhere"}}
    arms |= {"choice": {"select.metric": "target/val/nonsense"}, "deep": {DEPTH: 99}}
    arms |= {"devices": {"trainer.strategy": "nonsense"}}
    parameters = {k: v for k, v in content["parameters"].items() if "value" in v}
    bad.write_text(yaml.safe_dump({**content, "arms": arms, "parameters": parameters}))
    assert main(["sweep", "plan", str(bad)]) == 2
    error = capsys.readouterr().err
    assert "7 of 8 arms are refused" in error
    assert all(f"arm {name}: " in error for name in arms if name != "good")
    assert "arm typo: " in error
    assert "wieght" in error
    assert "arm minus: data.batch_size=-1 must be at least 1" in error
    assert not (study.parent / "bad").exists()


def test_diverged_arm_is_in_the_table_as_failed_with_its_reason(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study.with_name("lost.yaml")
    content = yaml.safe_load(study.read_text())
    parameters = {k: v for k, v in content["parameters"].items() if "value" in v}
    parameters["trainer.max_epochs"] = {"value": 3}  # a step each: the second has a loss that is not finite
    arms = {"good": {}, "lost": {"model.optimizer.lr": 1e30}}
    file.write_text(yaml.safe_dump({**content, "arms": arms, "parameters": parameters, "seeds": 1, "baseline": "good"}))
    assert (
        main(["sweep", "run", str(file), "--slots=1", "--source_leg.model.init_args.optimizer.init_args.lr=0.01"]) == 1
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed: lost s0: TrainingError: training diverged: " in printed
    root = study.parent / "lost"
    lost, good = (RunFolder(next(root.glob(f"{arm}-s0-*"))) for arm in ("lost", "good"))
    assert lost.summary()["status"] == "failed"
    assert "lower the learning rate" in lost.summary()["error"]
    assert good.summary()["status"] == "finished"
    assert "| lost | 0, 1 failed | — |" in (root / "comparison.md").read_text()
    assert "training diverged" in (root / "comparison.html").read_text()
