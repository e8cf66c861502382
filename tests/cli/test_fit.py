"""``crossft fit`` end to end: what the folders hold, what is reused, what a flag wins over."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crossft.callbacks.monitoring import load_checkpoint
from crossft.callbacks.monitoring.checkpoint_io import check
from crossft.cli import main
from crossft.cli.saved import open_run
from crossft.runs import RunFolder, read_json, read_metrics, write_json

Fit = Callable[..., int]


def test_one_command_leaves_two_complete_run_folders(runs: Path, finished: Path) -> None:
    (source,) = runs.glob("source-*")
    for path in (source, finished):
        folder = RunFolder(path)
        assert folder.summary()["status"] == "finished"
        check(folder.last)
        for file in (folder.config, folder.before, folder.splits, folder.metrics, folder.ledger):
            assert file.stat().st_size > 0, file
        assert (folder.figures / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob(".tmp-*"))
    (anchors,) = RunFolder(finished).anchors.iterdir()
    assert anchors.name == "l2sp.safetensors"
    start = load_checkpoint(RunFolder(source).best)["state_dict"]
    anchored, named = load_file(anchors), open_run("test", [str(finished)]).task.backbone.named_parameters()
    for i, (name, _) in enumerate(named):
        assert torch.equal(anchored.pop(f"anchor_{i}"), start[f"backbone.{name}"]), name
    assert not anchored
    assert not RunFolder(source).anchors.exists(), "no method ran there"


def test_summary_says_what_was_gained_and_kept(runs: Path, finished: Path) -> None:
    summary = RunFolder(finished).summary()
    metrics = summary["metrics"]
    before, after = metrics["target/test/accuracy/before"], metrics["target/test/accuracy"]
    assert metrics["target/gain"] == pytest.approx(after - before)
    kept = metrics["source/test/accuracy"] / metrics["source/test/accuracy/before"]
    assert metrics["source/retention"] == pytest.approx(kept)
    assert metrics["source/gain"] == pytest.approx(
        metrics["source/test/accuracy"] - metrics["source/test/accuracy/before"]
    )
    assert summary["experiment"] == "tiny"
    assert summary["arm"] == "full"
    assert summary["seed"] == 0
    assert summary["parent"] == str(next(runs.glob("source-*")))
    assert summary["checkpoint"] == "checkpoints/last.ckpt"
    assert summary["selected_by"] is None
    assert summary["domains"] == {"source": ["photo"], "target": ["sketch"]}
    assert summary["primary"] == {"source": "accuracy", "target": "accuracy"}
    assert finished.name == f"full-s0-{summary['config_hash'][:8]}"


def test_the_target_leg_starts_from_the_sources_model(runs: Path, finished: Path) -> None:
    (source,) = runs.glob("source-*")
    end = RunFolder(source).summary()["metrics"]["source/test/accuracy"]
    assert RunFolder(finished).summary()["metrics"]["source/test/accuracy/before"] == pytest.approx(end)


def test_the_source_leg_never_sees_the_target(runs: Path) -> None:
    (source,) = runs.glob("source-*")
    config = yaml.safe_load((source / "config.yaml").read_text())
    assert config["data"]["target"] is None
    assert config["methods"] == {}
    assert config["trainer"]["max_epochs"] == 1
    assert list(read_json(source / "splits.json")) == ["photo"]
    summary = RunFolder(source).summary()
    assert summary["selected_by"] == "source/val/accuracy"
    assert summary["checkpoint"] == "checkpoints/best.ckpt"
    assert summary["metrics"]["source/test/accuracy/before"] is None
    assert summary["metrics"]["source/retention"] is None


def test_splits_of_the_source_are_inherited(runs: Path, finished: Path) -> None:
    (source,) = runs.glob("source-*")
    assert read_json(finished / "splits.json")["photo"] == read_json(source / "splits.json")["photo"]


def test_label_names_stand_in_config_and_checkpoint(finished: Path) -> None:
    domains = yaml.safe_load((finished / "config.yaml").read_text())["model"]["init_args"]["domains"]
    assert [(d["name"], d["labels"]) for d in domains] == [("photo", ["cat", "dog"]), ("sketch", ["cat", "dog"])]
    saved = load_checkpoint(finished / "checkpoints" / "last.ckpt")
    assert [d["name"] for d in saved["domains"]] == ["photo", "sketch"]
    assert not any("attachments" in key for key in saved["state_dict"])


def test_frozen_stages_are_those_the_leg_started_with(runs: Path, finished: Path) -> None:
    (source,) = runs.glob("source-*")
    start = load_checkpoint(source / "checkpoints" / "best.ckpt")["state_dict"]
    end = load_checkpoint(finished / "checkpoints" / "last.ckpt")["state_dict"]
    moved = {k.split(".")[2] for k in start if k.startswith("backbone.model.") and not torch.equal(start[k], end[k])}
    assert moved
    assert moved <= {"layer3", "layer4"}, moved


def test_confusion_matrix_counts_every_test_row(finished: Path) -> None:
    lines = (finished / "confusion" / "sketch.csv").read_text().splitlines()
    assert lines[0] == "true,cat,dog"
    counts = sum(int(v) for line in lines[1:] for v in line.split(",")[1:])
    assert counts == len(read_json(finished / "splits.json")["sketch"]["test"])


def test_calibration_bins_give_the_calibration_error(finished: Path) -> None:
    """The file holds what the metric was computed from: the gap of confidence and accuracy, weighted by rows."""
    for key, name in (("target", "sketch"), ("source", "photo")):
        rows = list(csv.DictReader((finished / "calibration" / f"{name}.csv").open()))
        assert [float(r["low"]) for r in rows] == pytest.approx([i / 15 for i in range(15)])
        full = [r for r in rows if int(r["rows"])]
        assert all(float(r["low"]) < float(r["confidence"]) <= float(r["high"]) + 1e-6 for r in full)
        count = sum(int(r["rows"]) for r in rows)
        assert count == len(read_json(finished / "splits.json")[name]["test"])
        gap = sum(int(r["rows"]) * abs(float(r["confidence"]) - float(r["accuracy"])) for r in full) / count
        metrics = RunFolder(finished).summary()["metrics"]
        assert gap == pytest.approx(metrics[f"{key}/test/calibration_error"], abs=1e-5)
        right = sum(int(r["rows"]) * float(r["accuracy"]) for r in full) / count
        assert right == pytest.approx(metrics[f"{key}/test/accuracy"], abs=1e-5)


def test_starting_model_is_measured_once_for_arms_that_differ_in_methods(
    fit: Fit, runs: Path, finished: Path, tmp_path: Path
) -> None:
    (source,) = runs.glob("source-*")
    root = tmp_path / "tiny"
    shutil.copytree(source, root / source.name)
    (measured,) = (root / source.name / "measured").glob("*.json")
    assert read_json(measured) == read_json(finished / "before.json")
    marked = read_json(measured)
    marked["metrics"]["target/test/accuracy"] = 0.123
    write_json(measured, marked)
    assert fit(tmp_path, "--data.shots=5", "--arm=plain", "--methods.l2sp=null", "--trainer.max_epochs=1") == 0
    assert fit(tmp_path, "--data.shots=4", "--arm=other", "--trainer.max_epochs=1") == 0
    plain, other = (RunFolder(next(root.glob(f"{arm}-s0-*"))) for arm in ("plain", "other"))
    assert {plain.summary()["parent"], other.summary()["parent"]} == {str(root / source.name)}
    assert plain.summary()["metrics"]["target/test/accuracy/before"] == 0.123
    expected = read_json(finished / "before.json")["metrics"]["target/test/accuracy"]
    assert other.summary()["metrics"]["target/test/accuracy/before"] == expected, "other data: measured by itself"
    assert len(list(measured.parent.glob("*.json"))) == 2


def test_metrics_csv_follows_validation(finished: Path) -> None:
    names = {row.name for row in read_metrics(finished / "metrics.csv")}
    assert {"source/val/accuracy", "source/val/loss"} <= names
    assert not any(name.startswith("target/val/") for name in names), "with shots, validation has no labels"
    assert not any("/test/" in name for name in names), "a test metric was logged while training"


def test_same_command_again_is_refused(runs: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(runs.parent, "--data.shots=5", "--arm=full") == 1
    assert "--run.dir" in capsys.readouterr().err


def test_config_of_a_run_runs_again_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["fit", "--config", str(finished / "config.yaml"), "--run.dir", str(again)]) == 0
    old, new = (load_checkpoint(p / "checkpoints" / "last.ckpt")["state_dict"] for p in (finished, again))
    assert all(torch.equal(old[k], new[k]) for k in old)
    first, second = (RunFolder(p).summary() for p in (finished, again))
    added = {
        k for k in first["metrics"] if k.startswith("baseline/")
    }  # by `crossft baseline`, where its tests came first
    assert {k: v for k, v in first["metrics"].items() if k not in added} == second["metrics"]
    assert first["config_hash"] == second["config_hash"]


def test_other_targets_and_arms_reuse_the_source(runs: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = runs.glob("source-*")
    stamp = (source / "summary.json").stat().st_mtime_ns
    flags = ["--methods.l2sp=null", "--methods.freeze=null", "--arm=plain", "--before=false"]
    assert fit(runs.parent, *flags, target="cartoon") == 0
    assert "reusing" in capsys.readouterr().out
    assert (source / "summary.json").stat().st_mtime_ns == stamp
    (run,) = runs.glob("plain-*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["methods"] == {}
    metrics = RunFolder(run).summary()["metrics"]
    assert not [k for k in metrics if k.endswith("/before") or "retention" in k], "before was switched off"


def test_init_takes_heads_by_label_space(finished: Path, fit: Fit, tmp_path: Path) -> None:
    assert fit(tmp_path, f"--init={finished}", "--trainer.max_steps=1", "--seed_everything=3") == 0
    (run,) = (tmp_path / "tiny").iterdir()
    summary = RunFolder(run).summary()
    assert summary["parent"] == str(finished)
    assert summary["seed"] == 3
    end = RunFolder(finished).summary()["metrics"]
    for key in ("source/test/accuracy", "target/test/accuracy"):
        assert summary["metrics"][f"{key}/before"] == pytest.approx(end[key])


def test_a_terminal_shows_a_bar_with_the_metrics_that_matter(finished: Path, fit: Fit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    flags = [f"--init={finished}", "--trainer.log_every_n_steps=1"]
    assert fit(tmp_path, *flags, "--trainer.max_epochs=2", f"--run.dir={tmp_path / 'run'}") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"Epoch 1/1 .*train/loss: \d\.\d{3}.*source/val/accuracy: \d\.\d{3}", shown), shown[-2000:]
    assert "v_num" not in shown


def test_init_leaves_a_head_of_another_label_space_fresh(
    finished: Path, images: Path, config: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "sketch" / "dog").rename(data / "sketch" / "wolf")
    named = [f"--data.root={data}", "--data.source=photo", "--data.target=sketch", f"--run.root={tmp_path}"]
    code = main(["fit", f"--config={config}", *named, f"--init={finished}", "--trainer.max_steps=1", "--arm=wolf"])
    assert code == 0
    metrics = RunFolder(next((tmp_path / "tiny").glob("wolf-*"))).summary()["metrics"]
    assert metrics["target/test/accuracy/before"] is None
    assert metrics["target/gain"] is None
    assert metrics["source/test/accuracy/before"] is not None
    assert metrics["source/retention"] is not None


def test_selected_checkpoint_is_the_one_measured(finished: Path, fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert fit(tmp_path, f"--init={finished}", "--select=source/val/loss", f"--run.dir={folder}") == 0
    summary = RunFolder(folder).summary()
    assert summary["selected_by"] == "source/val/loss"
    assert summary["checkpoint"] == "checkpoints/best.ckpt"
    losses = {r.step: r.value for r in read_metrics(folder / "metrics.csv") if r.name == "source/val/loss"}
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"]
    assert best - 1 == min(losses, key=losses.__getitem__)
    assert summary["metrics"]["source/val/loss"] == pytest.approx(min(losses.values()), rel=1e-5)


def test_final_table_and_paths_are_printed(finished: Path, fit: Fit, tmp_path: Path, capsys) -> None:
    assert fit(tmp_path, f"--init={finished}", "--trainer.max_steps=1", f"--run.dir={tmp_path / 'run'}") == 0
    printed = capsys.readouterr().out
    for word in ("target (sketch)", "source (photo)", "before", "retention", str(tmp_path / "run")):
        assert word in printed, word
