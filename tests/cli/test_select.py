"""Choosing without target labels, and what an oracle would have chosen, from the command line."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console
from tiny import TinyVision

from crossft.callbacks.monitoring import Scores, load_checkpoint
from crossft.cli.parser import Settings
from crossft.cli.selection import scores_followed
from crossft.data import DomainData
from crossft.reports.final import final_table
from crossft.runs import RunFolder, read_metrics
from crossft.tasks import Classification

Fit = Callable[..., int]
FLAGS = ["--source_leg=null", "--data.train_on=source", "--data.target_labels=none", "--before=false",
         "--methods.l2sp=null", "--trainer.max_epochs=3", "--data.splits=[0.4,0.4,0.2]",
         "--methods.mmd=crossft.callbacks.adaptation.MMD"]  # fmt: skip


@pytest.fixture(scope="module")
def chosen(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that chose by infomax and reports the oracle."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    words = ["--select=target/val/infomax", "--select.oracle=true", f"--run.dir={folder}"]
    assert fit(folder.parent, *FLAGS, *words) == 0
    return RunFolder(folder)


def logged(folder: RunFolder, name: str) -> dict[int, float]:
    """By the number of steps taken."""
    return {r.step + 1: r.value for r in read_metrics(folder.metrics) if r.name == name}


def test_the_checkpoint_is_the_one_of_the_best_score(chosen: RunFolder) -> None:
    scores = logged(chosen, "target/val/infomax")
    assert len(scores) == 3
    best = load_checkpoint(chosen.best)["global_step"]
    assert best == max(scores, key=scores.__getitem__)
    summary = chosen.summary()
    assert summary["selected_by"] == "target/val/infomax"
    assert summary["checkpoint"] == "checkpoints/best.ckpt"
    assert summary["metrics"]["target/val/infomax"] == pytest.approx(scores[best], rel=1e-4), "a search reads it there"
    assert not any(key.startswith("target/val/acc") for key in summary["metrics"]), (
        "the target has no labels to validate"
    )
    assert not logged(chosen, "target/val/snd"), "a score that nothing follows was computed"


def test_the_oracle_stands_apart_and_gives_the_regret(chosen: RunFolder) -> None:
    metrics = chosen.summary()["metrics"]
    with (chosen.path / "oracle.csv").open() as file:
        scores = {int(r["step"]): float(r["value"]) for r in csv.DictReader(file)}
    assert set(scores) == set(logged(chosen, "target/val/infomax"))
    step = load_checkpoint(chosen.best)["global_step"]
    after = metrics["target/test/accuracy"]
    assert scores[step] == pytest.approx(after), "what was recorded is not what the final test measured"
    assert metrics["oracle/target/test/accuracy"] == pytest.approx(max(scores.values()))
    assert metrics["oracle/target/regret"] == pytest.approx(max(scores.values()) - after)
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(final_table(chosen.summary()))
    said = f"by target labels: accuracy {max(scores.values()):.3f}, regret {metrics['oracle/target/regret']:.3f}"
    assert said in " ".join(printed.export_text().split())
    losses = logged(chosen, "source/val/loss")
    by_loss = scores[min(losses, key=losses.__getitem__)]
    assert metrics["oracle/target/regret/source/val/loss"] == pytest.approx(max(scores.values()) - by_loss)
    assert not (chosen.path / "oracle").exists()
    assert not any(row.name.startswith("oracle") for row in read_metrics(chosen.metrics))


def test_a_model_validated_between_steps_can_be_chosen(fit: Fit, tmp_path: Path) -> None:
    """Every validation follows micro-batch 3 of 5, the first of two that are accumulated: after a step and a half."""
    words = ["--select=source/val/loss", "--select.oracle=true", "--trainer.accumulate_grad_batches=2"]
    words += ["--trainer.val_check_interval=3", "--data.limit=24"]
    words += [f"--run.dir={tmp_path / 'run'}"]
    assert fit(tmp_path, *FLAGS, *words) == 0
    run = RunFolder(tmp_path / "run")
    losses = logged(run, "source/val/loss")
    with (run.path / "oracle.csv").open() as file:
        scores = {int(r["step"]): float(r["value"]) for r in csv.DictReader(file)}
    assert set(scores) == set(losses)
    assert len(losses) == 3
    metrics, chosen = run.summary()["metrics"], min(losses, key=losses.__getitem__)
    assert load_checkpoint(run.best)["global_step"] == chosen - 1
    assert metrics["source/val/loss"] == pytest.approx(losses[chosen], rel=1e-4)
    assert metrics["target/test/accuracy"] == pytest.approx(scores[chosen])
    assert metrics["oracle/target/regret/source/val/accuracy"] is not None


def test_a_metric_that_is_not_measured_is_refused_before_the_source_is_fitted(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "--select=target/val/nonsense") == 2
    assert "select='target/val/nonsense' is not measured in validation" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_target_labels_move_the_oracle_alone(chosen: RunFolder, fit: Fit, images: Path, tmp_path: Path) -> None:
    """With the target's labels permuted, weights, choice and all other metrics are the same bits."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for i, path in enumerate(sorted((data / "sketch").glob("*/*.png"))):
        path.rename(data / "sketch" / ("dog", "cat")[i % 2] / f"moved-{i:03d}.png")
    words = ["--select.metric=target/val/infomax", "--select.oracle=true", f"--run.dir={tmp_path / 'run'}"]
    assert fit(tmp_path, *FLAGS, *words, f"--data.root={data}") == 0
    other = RunFolder(tmp_path / "run")
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (load_checkpoint(f.checkpoints / name) for f in (chosen, other))
        assert one["global_step"] == two["global_step"]
        assert all(torch.equal(one["state_dict"][k], two["state_dict"][k]) for k in one["state_dict"])
    rows = [{(r.step, r.name): r.value for r in read_metrics(f.metrics)} for f in (chosen, other)]
    assert rows[0] == rows[1]
    a, b = (f.summary()["metrics"] for f in (chosen, other))
    moved = {k for k in a if a[k] != b[k]}
    assert "target/test/accuracy" in moved
    assert all(k.startswith(("target/test/", "oracle/")) for k in moved)


def test_without_the_oracle_nothing_is_recorded_and_the_weights_are_the_same(
    chosen: RunFolder, fit: Fit, tmp_path: Path
) -> None:
    assert fit(tmp_path, *FLAGS, f"--run.dir={tmp_path / 'run'}") == 0
    plain = RunFolder(tmp_path / "run")
    one, two = (load_checkpoint(f.last)["state_dict"] for f in (chosen, plain))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any("oracle" in k for k in plain.summary()["metrics"])
    assert not (plain.path / "oracle.csv").exists()
    assert not [r for r in read_metrics(plain.metrics) if r.name.startswith("target/val/")]


def test_a_score_that_early_stopping_follows_is_logged(images: Path) -> None:
    data = DomainData(images, "photo", "sketch", train_on="source", target_labels="none", splits=(0.4, 0.4, 0.2))
    task = Classification(TinyVision(), list(data.domains))
    (scores,) = scores_followed("source/val/loss", task, data, [EarlyStopping("target/val/snd")])
    assert scores.scores == ["snd"]
    assert scores_followed("target/val/snd", task, data, [Scores()]) == []
    assert scores_followed("source/val/loss", task, data, []) == []


def test_both_short_and_long_flags_are_read(config: Path) -> None:
    for words in (["--select", "a/val/b"], ["--select=a/val/b"], ["--select.metric=a/val/b"]):
        select = Settings([f"--config={config}", "--data.root=.", *words, "--select.oracle=true"]).config.select
        assert (select.metric, select.oracle) == ("a/val/b", True)
    assert Settings([f"--config={config}", "--data.root=.", "--select=null"]).config.select.metric is None
