"""A chain over two processes: one decides, both train, one writes; started by Lightning and by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.runs import RunFolder

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
    return [*named, *spread, f"--run.root={root}", "--trainer.callbacks=interrupting.StopAt", "--allow=interrupting"]


def test_lightning_starts_both_legs(chain: Path) -> None:
    folders = {p.name.split("-")[0]: RunFolder(p).summary() for p in chain.iterdir() if p.is_dir()}
    assert {name: s["status"] for name, s in folders.items()} == {"source": "finished", "lightning": "finished"}
    assert folders["lightning"]["metrics"]["source/retention"] is not None


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


def test_a_lone_rank_is_refused(config: Path, images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CROSSFT_LAUNCH", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["fit", *flags(config, images, tmp_path)]) == 1
    assert not (tmp_path / "tiny").exists()
