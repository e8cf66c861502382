"""A chain over two processes: one decides, both train, one writes; started by Lightning and by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.runs import RunFolder, read_metrics
from crossft.sweeps.early import EarlyTerminate
from crossft.sweeps.study import TrialReports, TrialStudy

ROOT = Path(__file__).resolve().parents[2]


def start(launcher: list[str], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cli")])
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK")}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def chain(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source and target leg, started by Lightning; the whole chain on two processes."""
    root = tmp_path_factory.mktemp("two")
    done = start(["crossft.cli", "fit"], *flags(config, images, root), "--arm=lightning")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    assert done.stdout.count("run folder:") == 2, "both processes printed, or a leg is missing"
    return root / "tiny"


def flags(config: Path, images: Path, root: Path) -> list[str]:
    named = [f"--config={config}", f"--data.root={images}", "--data.source=photo", "--data.target=sketch"]
    spread = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.max_epochs=1"]
    spread += ["--model.batchnorm=frozen"]  # statistics of a batch are those of a process
    return [*named, *spread, f"--run.root={root}", "--trainer.callbacks=interrupting.StopAt", "--allow=interrupting"]


def test_lightning_starts_both_legs(chain: Path) -> None:
    folders = {p.name.split("-")[0]: RunFolder(p).summary() for p in chain.iterdir() if p.is_dir()}
    assert {name: s["status"] for name, s in folders.items()} == {"source": "finished", "lightning": "finished"}
    assert folders["lightning"]["metrics"]["source/retention"] is not None


def test_two_processes_end_where_one_does(chain: Path, config: Path, images: Path, tmp_path: Path) -> None:
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--data.batch_size=8", "--arm=alone"]
    assert main(["fit", *flags(config, images, tmp_path), *alone]) == 0
    for name in ("source-*", "[la]*-s0-*"):
        (one,), (two,) = ((root.glob(name)) for root in (tmp_path / "tiny", chain))
        first, second = (load_checkpoint(p / "checkpoints" / "last.ckpt") for p in (one, two))
        assert first["global_step"] == second["global_step"] > 1
        for key, value in first["state_dict"].items():
            torch.testing.assert_close(value, second["state_dict"][key], rtol=1e-4, atol=1e-6)


@pytest.mark.soak
def test_torchrun_reuses_the_source_and_stops_on_a_signal(chain: Path, config: Path, images: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "crossft.cli", "fit"]
    words = [*flags(config, images, chain.parent), "--arm=torchrun"]
    done = start(torchrun, *words, STOP_IN="target", STOP_AT="1")
    assert "reusing" in done.stdout, done.stdout[-1500:] + done.stderr[-4000:]
    assert done.stdout.count("reusing") == 1
    (run,) = chain.glob("torchrun-*")
    assert RunFolder(run).summary()["status"] == "interrupted"
    assert done.returncode != 0
    again = start(["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "crossft.cli", "resume"],
                  str(run), "--allow=interrupting")  # fmt: skip
    assert again.returncode == 0, again.stdout[-1500:] + again.stderr[-4000:]
    (whole,) = chain.glob("lightning-*")
    one, other = (load_checkpoint(p / "checkpoints" / "last.ckpt")["state_dict"] for p in (whole, run))
    assert all(torch.equal(one[k], other[k]) for k in one), "stopped and resumed is not the run that never stopped"


@pytest.mark.soak
def test_a_search_ends_all_processes_at_the_same_step(chain: Path, config: Path, images: Path, tmp_path: Path) -> None:
    early = EarlyTerminate("hyperband", 2, 2)
    study = TrialStudy(tmp_path / "search.db", "s", True, 9, early)
    better = TrialReports(study.file, "s", study.ask().number, early)
    assert not any(better.worse(validation, 2.0) for validation in (1, 2, 3))
    where = {"storage": study.file, "study": "s", "number": study.ask().number, "metric": "target/val/accuracy"}
    trial = [f"--trial.{key}={value}" for key, value in where.items()]
    trial += [f"--trial.early_terminate={json.dumps(asdict(early))}"]
    (parent,) = chain.glob("lightning-*")
    words = [
        *flags(config, images, tmp_path),
        "--trainer.max_epochs=5",
        f"--init={parent}",
        f"--run.dir={tmp_path}/run",
    ]
    words = [
        word.replace("interrupting.StopAt", "crashing.Ends").replace("=interrupting", "=crashing") for word in words
    ]
    done = start(["crossft.cli", "fit"], *words, *trial, ENDS=str(tmp_path))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    assert done.stdout.count("ended early by the search") == 1
    folder = RunFolder(tmp_path / "run")
    summary = folder.summary()
    assert summary["status"] == "pruned"
    assert "after validation 2: target/val/accuracy" in summary["error"]
    assert not any("/test/" in key for key in summary["metrics"])
    rows = [row for row in read_metrics(folder.metrics) if row.name == "target/val/accuracy"]
    assert {(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)} == {f"Pruned {rows[-1].step + 1}"}
    assert list(study.trials()[1].intermediate_values.values()) == [row.value for row in rows]
    assert len(rows) == 2
    again = start(["crossft.cli", "resume"], str(folder.path))
    assert (again.returncode, "is pruned: nothing to resume" in again.stdout) == (0, True)


def test_a_lone_rank_is_refused(config: Path, images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CROSSFT_LAUNCH", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["fit", *flags(config, images, tmp_path)]) == 1
    assert not (tmp_path / "tiny").exists()
