"""A real SLURM on this machine: an array of arms, one preempted in training; and two ranks under srun, signalled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from cluster.local_slurm import cluster, missing

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.runs import RunFolder, read_metrics

ROOT = Path(__file__).resolve().parents[2]
HOLD = ["--trainer.callbacks=interrupting.HoldAt", "--allow=interrupting", "--checkpoints.every_n_steps=2"]

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no local SLURM: {missing()} not installed (slurm-wlm, munge)")


@pytest.fixture(scope="module")
def slurm() -> Iterator[pytest.MonkeyPatch]:
    """The cluster, named in the environment, which its jobs inherit."""
    with cluster() as names, pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cli")]))
        patch.setenv("HOLD_AT", "3")
        patch.setenv("HOLD_IN", "weight=1-")
        yield patch


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait(condition: Callable[[], bool], what: Callable[[], str], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what()
        time.sleep(0.2)


def at_once(job: str) -> bool:
    """Whether the queue has a requeued job again; SLURM would start it two minutes later, so it is told not to wait."""
    waits = said("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i").split()
    if job in waits:
        said("scontrol", "update", f"JobId={job}", "StartTime=now")
    return job in waits


def study(folder: Path, config: Path, images: Path) -> Path:
    """A sweep file of two arms, whose runs lie beside it."""
    fixed = {"data.root": str(images), "data.source": "photo", "data.target": "sketch", "run.root": str(folder)}
    fixed |= {"data.num_workers": 1, "checkpoints.every_n_steps": 2, "trainer.callbacks": "interrupting.HoldAt"}
    parameters = {key: {"value": value} for key, value in fixed.items()}
    parameters |= {"methods.l2sp.weight": {"values": [0.1, 1.0]}}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"config": str(config), "parameters": parameters}))
    return file


@pytest.mark.soak
def test_array_with_a_preempted_arm_ends_as_the_local_sweep(
    slurm: pytest.MonkeyPatch, config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.chdir(tmp_path)
    folders = {name: tmp_path / name for name in ("cluster", "local")}
    for folder in folders.values():
        folder.mkdir()
    file = study(folders["cluster"], config, images)
    command = ["sweep", "slurm", str(file), "--allow=interrupting", "--time=30"]
    assert main(command) == 0
    assert "2 runs: 0 finished, 0 failed, 0 in the queue, 2 submitted" in capsys.readouterr().out
    root = folders["cluster"] / "study"

    def logs() -> str:
        return "\n".join(p.read_text(errors="replace")[-2000:] for p in root.rglob("*") if p.suffix in (".log", ".out"))

    wait(lambda: any("holding at" in p.read_text() for p in root.glob("logs/weight=1-*.log")), logs)
    (preempted,) = root.glob("logs/weight=1-*.job")
    job = preempted.read_text()
    said("scontrol", "requeue", job)
    assert main(command) == 0
    assert "in the queue, 0 submitted" in capsys.readouterr().out
    wait(lambda: at_once(job) or preempted.with_suffix(".log").read_text().count("$ crossft") == 2, logs)
    wait(lambda: not said("squeue", "--noheader"), logs)

    assert (
        main(["sweep", "run", str(study(folders["local"], config, images)), "--allow=interrupting", "--threads=1"]) == 0
    )
    log = preempted.with_suffix(".log").read_text()
    assert log.count("$ crossft fit ") == 2, log
    assert "stopped by SIGTERM at optimizer step 4, after saving" in log
    assert "DataLoader worker" not in log, "a loader of data died of the signal"
    assert sum(p.read_text().count("source: fitting") for p in root.glob("logs/*.log")) == 1
    runs = {name: sorted((folder / "study").glob("weight=*")) for name, folder in folders.items()}
    assert len(runs["cluster"]) == 2
    for one, other in zip(runs["cluster"], runs["local"], strict=True):
        same(one, other)
    capsys.readouterr()
    assert main(command) == 0
    assert "2 runs: 2 finished, 0 failed, 0 in the queue, 0 submitted" in capsys.readouterr().out
    assert (root / "comparison.html").is_file(), "where nothing is left, the comparison is written"


def same(one: Path, other: Path) -> None:
    """The same bits, and the same numbers."""
    assert one.name.rpartition("-")[0] == other.name.rpartition("-")[0]
    assert RunFolder(one).summary()["status"] == RunFolder(other).summary()["status"] == "finished"
    first, second = (load_checkpoint(p / "checkpoints" / "last.ckpt") for p in (one, other))
    assert first["global_step"] == second["global_step"] > 4
    assert all(torch.equal(first["state_dict"][k], second["state_dict"][k]) for k in first["state_dict"])
    assert RunFolder(one).summary()["metrics"] == RunFolder(other).summary()["metrics"]
    rows = [[(r.step, r.name, r.value) for r in read_metrics(p / "metrics.csv")] for p in (one, other)]
    assert rows[0] == rows[1]


def test_two_ranks_under_srun_save_together_and_are_requeued(
    slurm: pytest.MonkeyPatch, config: Path, images: Path, tmp_path: Path
) -> None:
    slurm.chdir(tmp_path)
    slurm.setenv("HOLD_IN", "two-")
    words = [f"--config={config}", f"--data.root={images}", "--data.source=photo", "--data.target=sketch"]
    words += ["--source_leg=null", "--model.batchnorm=frozen", f"--run.root={tmp_path}", *HOLD]
    two = ["--arm=two", "--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp"]
    script = tmp_path / "job.sh"
    command = " ".join(["srun", sys.executable, "-m", "crossft.cli", "fit", *words, *two])
    options = "#SBATCH --ntasks-per-node=2 --nodes=1 --requeue --time=30 --output=log.txt --open-mode=append"
    script.write_text(f"#!/bin/bash\n{options}\n{command}\n")
    job = said("sbatch", "--parsable", str(script)).strip()
    log = tmp_path / "log.txt"
    wait(lambda: log.is_file() and log.read_text().count("holding at step 3") == 2, lambda: said("cat", str(log)))
    said("scancel", "--signal=USR1", job)
    wait(lambda: at_once(job), log.read_text)
    assert "stopped by SIGUSR1 at optimizer step 4, after saving; SLURM job" in log.read_text()
    assert f"SLURM job {job} is requeued" in log.read_text()
    assert main(["fit", *words, "--arm=one", "--data.batch_size=8"]) == 0
    wait(lambda: not said("squeue", "--noheader"), log.read_text)
    (run,), (alone,) = ((tmp_path / "tiny").glob(f"{arm}-*") for arm in ("two", "one"))
    assert RunFolder(run).summary()["status"] == "finished", log.read_text()
    assert RunFolder(run).summary()["error"] is None
    first, second = (load_checkpoint(p / "checkpoints" / "last.ckpt") for p in (run, alone))
    assert first["global_step"] == second["global_step"] > 4
    assert len(first["callbacks"]["Checkpoints"]["rng"]) == 2, "one generator state a rank"
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(value, second["state_dict"][key], rtol=1e-4, atol=1e-6)
