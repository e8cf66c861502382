"""``crossft resume``: a chain stopped in either leg ends in the bits of the chain that was never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crossft.callbacks.monitoring import latest_valid, load_checkpoint
from crossft.cli import main
from crossft.runs import RunFolder, read_json, read_metrics, write_json

STOPPABLE = ["--trainer.callbacks=interrupting.StopAt", "--allow=interrupting", "--checkpoints.every_n_steps=2"]
STOPPABLE += ["--methods.dann=crossft.callbacks.adaptation.DANN", "--methods.dann.hidden=8", "--arm=stopped"]


@pytest.fixture(scope="module")
def never_stopped(fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert fit(root, *STOPPABLE) == 0
    return next((root / "tiny").glob("stopped-*"))


def same_bits(one: Path, other: Path) -> None:
    first, second = (load_checkpoint(p / "checkpoints" / "last.ckpt") for p in (one, other))
    assert first["global_step"] == second["global_step"]
    assert all(torch.equal(first["state_dict"][k], second["state_dict"][k]) for k in first["state_dict"])
    terms = (c["terms"]["dann"]["state"] for c in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in terms)))
    assert RunFolder(one).summary()["metrics"] == RunFolder(other).summary()["metrics"]
    rows = [read_metrics(p / "metrics.csv") for p in (one, other)]
    assert [(r.step, r.name, r.value) for r in rows[0]] == [(r.step, r.name, r.value) for r in rows[1]]


def damage_newest(run: Path) -> None:
    """Flip a byte of the newest step's checkpoint; the one before it is the newest valid one then."""
    *_, older, newest = sorted((run / "checkpoints").glob("step-*.ckpt"), key=lambda p: int(p.stem[5:]))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert latest_valid(run / "checkpoints") == older


@pytest.mark.parametrize(
    ("role", "step", "damaged"), [("target", "3", False), ("source", "1", False), ("target", "3", True)]
)
def test_stopped_chain_ends_in_the_same_bits(
    never_stopped: Path, fit: Callable[..., int], tmp_path: Path, monkeypatch, capsys, role: str, step: str, damaged
) -> None:
    """Where the newest checkpoint is damaged, a resume takes the one before it."""
    monkeypatch.setenv("STOP_IN", role)
    monkeypatch.setenv("STOP_AT", step)
    assert fit(tmp_path, *STOPPABLE) == 143
    (run,) = (tmp_path / "tiny").glob("stopped-*")
    (source,) = (tmp_path / "tiny").glob("source-*")
    assert RunFolder(run).summary()["status"] == "interrupted"
    assert RunFolder(source).summary()["status"] == ("finished" if role == "target" else "interrupted")
    monkeypatch.setenv("STOP_AT", "")
    capsys.readouterr()
    assert main(["resume", str(run)]) == 2
    assert "--allow interrupting" in capsys.readouterr().err
    assert RunFolder(run).summary()["status"] == "interrupted"
    if damaged:
        damage_newest(run)
    assert main(["resume", str(run), "--allow", "interrupting"]) == 0
    assert RunFolder(run).summary()["status"] == "finished"
    same_bits(never_stopped, run)


def test_resume_takes_before_from_its_file(
    finished: Path, fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_IN", "target")
    monkeypatch.setenv("STOP_AT", "0")
    run = tmp_path / "run"
    words = [f"--init={finished}", f"--run.dir={run}", "--trainer.max_steps=1", "--diagnose=false"]
    assert fit(tmp_path, *STOPPABLE[:2], *words) == 143
    before = read_json(run / "before.json")
    assert before["metrics"]["source/test/accuracy"] != 0.125
    before["metrics"]["source/test/accuracy"] = 0.125
    write_json(run / "before.json", before)
    monkeypatch.setenv("STOP_AT", "")
    assert main(["resume", str(run), "--allow=interrupting"]) == 0
    metrics = RunFolder(run).summary()["metrics"]
    assert metrics["source/test/accuracy/before"] == 0.125
    assert metrics["source/retention"] == pytest.approx(metrics["source/test/accuracy"] / 0.125)


def test_resume_of_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunFolder(finished).summary()
    assert main(["resume", str(finished)]) == 0
    assert "finished" in capsys.readouterr().out
    assert RunFolder(finished).summary() == before


def test_resume_takes_no_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(finished), "--trainer.max_epochs=9"]) == 2
    assert "takes no settings" in capsys.readouterr().err


def test_resume_refuses_a_config_that_was_edited(
    fit: Callable[..., int], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STOP_IN", "source")
    monkeypatch.setenv("STOP_AT", "0")
    assert fit(tmp_path, *STOPPABLE) == 143
    (run,) = (tmp_path / "tiny").glob("stopped-*")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 4"))
    assert main(["resume", str(run), "--allow=interrupting"]) == 1
    assert "config.yaml" in capsys.readouterr().err
