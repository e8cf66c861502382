"""A command inside a SLURM job, as its environment variables say; ``test_cluster.py`` starts real jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from crossft.cli.launch import Launch
from crossft.cli.leg import build_trainer
from crossft.cli.parser import Settings
from crossft.cli.slurm import environment, restarted
from crossft.errors import ConfigError
from crossft.runs import RunFolder
from crossft.sweeps.slurm import requeue

STEP = {"SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
STEP |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "n1"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def inside(**more: str | None) -> None:
        for name, value in {**STEP, **more}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return inside


def test_srun_is_told_from_an_allocation(job: Callable[..., None]) -> None:
    job()
    found = environment()
    assert isinstance(found, SLURMEnvironment)
    assert not found.auto_requeue, "Lightning would save inside the signal handler"
    assert (Launch().rank, Launch().world) == (0, 1)
    job(SLURM_STEP_ID=None, SLURM_PROCID=None)
    assert isinstance(environment(), LightningEnvironment)
    job(SLURM_STEP_ID=None, SLURM_NTASKS="4")
    with pytest.raises(ConfigError, match="put srun in front"):
        environment()
    job(SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE=None)
    with pytest.raises(ConfigError, match="ntasks-per-node=4"):
        environment()
    job(SLURM_JOB_NAME="interactive", SLURM_NTASKS="4")
    assert environment() is None


def test_the_trainer_leaves_requeueing_to_us_and_refuses_stray_checkpoints(
    job: Callable[..., None], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job()
    settings = Settings([f"--config={config}", "--data.root=.", "--data.source=a", "--data.target=b"])
    trainer = build_trainer(settings, logger=False)
    assert not trainer._accelerator_connector.cluster_environment.auto_requeue
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"hpc_ckpt_1\.ckpt is another program's"):
        build_trainer(settings, logger=False, default_root_dir=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="hpc_ckpt"):
        build_trainer(settings, logger=False)
    job(SLURM_NTASKS=None)
    build_trainer(settings, logger=False)


def test_requeue_names_the_element_and_says_what_came_of_it(
    job: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/said\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job()
    assert requeue("41") == "SLURM job 41 is requeued"
    job(SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="2")
    assert requeue("41") == "SLURM job 41_2 is requeued"
    assert (tmp_path / "said").read_text() == "requeue 41\nrequeue 41_2\n"
    scontrol.write_text("#!/bin/sh\necho Requested operation is presently disabled >&2; exit 1\n")
    assert requeue("41") == "SLURM job 41_2 is not requeued: Requested operation is presently disabled"


def test_the_same_command_goes_on_where_the_launcher_starts_it_again(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        assert not restarted()
        monkeypatch.setenv(name, "1")
        assert restarted()
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("STOP_IN", "target")
    words = ["--arm=again", "--source_leg=null", "--trainer.callbacks=interrupting.StopAt", "--allow=interrupting"]
    words += ["--checkpoints.every_n_steps=2", "--data.shots=8"]
    monkeypatch.setenv("STOP_AT", "1")
    assert fit(tmp_path, *words) == 143
    (run,) = (tmp_path / "tiny").glob("again-*")
    assert RunFolder(run).summary()["status"] == "interrupted"
    monkeypatch.setenv("STOP_AT", "")
    assert fit(tmp_path, *words) == 1, "by hand it is crossft resume"
    assert "crossft resume" in capsys.readouterr().err
    monkeypatch.setenv(name, "1")
    assert fit(tmp_path, *words) == 0
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == [run.name]
    assert RunFolder(run).summary()["status"] == "finished"
    before = RunFolder(run).summary()
    capsys.readouterr()
    assert fit(tmp_path, *words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert RunFolder(run).summary() == before
    assert fit(tmp_path, *words, "--run.resume=false") == 1


def test_only_the_source_is_fitted(fit: Callable[..., int], tmp_path: Path, capsys) -> None:
    assert fit(tmp_path, "--run.only_source=true") == 0
    (source,) = (p for p in (tmp_path / "tiny").iterdir() if p.is_dir())
    assert source.name.startswith("source-")
    assert RunFolder(source).summary()["status"] == "finished"
    assert fit(tmp_path, "--run.only_source=true") == 0
    assert "reusing" in capsys.readouterr().out
    assert fit(tmp_path, "--run.only_source=true", "--source_leg=null") == 2
    assert "fits no source first" in capsys.readouterr().err


def test_resuming_removes_nothing_but_a_run_that_never_began(fit: Callable[..., int], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    words = ["--source_leg=null", f"--run.dir={folder}", "--run.resume=true", "--trainer.max_epochs=1"]
    assert fit(tmp_path, *words) == 1
    assert "not a run folder" in capsys.readouterr().err
    (folder / "thesis.tex").rename(tmp_path / "thesis.tex")
    assert fit(tmp_path, *words) == 0, "what a process that died left behind is started afresh"
    assert RunFolder(folder).summary()["status"] == "finished"
