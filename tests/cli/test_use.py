"""What is done with a finished run: test, validate, predict, export; and the commands that need none."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import retention_cases
import timm
import torch
from lightning.pytorch import Callback
from PIL import Image
from tiny import TinyVision, image_domains

from crossft.backbones import Backbone
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints
from crossft.callbacks.monitoring.checkpoint_io import load_checkpoint
from crossft.callbacks.retention.teacher import check_known
from crossft.cli import main
from crossft.cli.catalog import found
from crossft.cli.evaluate import prepared_like
from crossft.cli.saved import open_run
from crossft.cli.weights import load_weights
from crossft.data.images import eval_transform
from crossft.errors import CheckpointError, ConfigError
from crossft.runs import RunFolder
from crossft.tasks import Classification, Task


def test_test_measures_what_the_summary_says(finished: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "test.json"
    assert main(["test", str(finished), "--output", str(out)]) == 0
    summary = RunFolder(finished).summary()["metrics"]
    found = json.loads(out.read_text())
    assert found
    assert found == {k: pytest.approx(summary[k]) for k in found}
    assert "balanced_accuracy" in capsys.readouterr().out


def test_a_flag_wins_over_the_runs_config(finished: Path, tmp_path: Path) -> None:
    one, few = tmp_path / "one.json", tmp_path / "few.json"
    assert main(["validate", str(finished), "--output", str(one)]) == 0
    assert main(["validate", str(finished), "--trainer.limit_val_batches=0", "--output", str(few)]) == 0
    assert "source/val/accuracy" in json.loads(one.read_text())
    assert json.loads(few.read_text()) == {}


def test_label_spaces_that_differ_are_the_runs_own(config: Path, tmp_path: Path, capsys) -> None:
    """Of other data that lack the target's first class, the labels keep their numbers."""
    data = image_domains(tmp_path / "data", ("photo",), size=16)
    image_domains(data, ("sketch",), ("bird", "fish", "worm"), size=16)
    named = [f"--data.root={data}", "--data.source=photo", "--data.target=sketch", f"--run.dir={tmp_path / 'run'}"]
    quick = ["--source_leg=null", "--trainer.max_steps=1", "--before=false", "--data.shots=2"]
    assert main(["fit", f"--config={config}", *named, *quick]) == 0
    shutil.rmtree(data / "sketch" / "bird")
    words = [str(tmp_path / "run"), f"--data.root={data}", "--data.shots=null"]
    saved = open_run("test", words)
    again = prepared_like(saved, keep_splits=False)
    assert [d.labels for d in again.domains] == [("cat", "dog"), ("bird", "fish", "worm")]
    assert set(again.prepared[1].known("test")) == {1, 2}
    assert main(["test", *words, "--output", str(tmp_path / "test.json")]) == 0
    assert "target/test/accuracy" in json.loads((tmp_path / "test.json").read_text())
    (data / "sketch" / "fish").rename(data / "sketch" / "wolf")
    capsys.readouterr()
    assert main(["test", *words]) == 1
    assert "label 'wolf' is outside the label space {bird, fish, worm}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_keeps_the_order_and_sums_to_one(finished: Path, images: Path, tmp_path: Path, suffix: str) -> None:
    files = sorted((images / "cartoon").rglob("*.png"))[::-3]
    out = tmp_path / f"out.{suffix}"
    assert main(["predict", str(finished), "--data.inputs", *map(str, files), "--output", str(out)]) == 0
    table = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert list(table["input"]) == [str(f) for f in files]
    assert list(table.columns) == ["input", "predicted", "p_cat", "p_dog"]
    assert (table[["p_cat", "p_dog"]].sum(axis=1) - 1).abs().max() < 1e-5
    task = open_run("predict", [str(finished)]).task
    transform = eval_transform(task.backbone.input_spec)
    pixels = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    with torch.no_grad():
        expected = task({"pixel_values": pixels}).softmax(1)[:, 0]
    assert torch.allclose(torch.tensor(table["p_cat"].to_numpy(), dtype=torch.float32), expected, atol=1e-5)


def test_predict_takes_the_head_of_a_domain(finished: Path, images: Path, tmp_path: Path, capsys) -> None:
    words = ["predict", str(finished), "--data.inputs", str(images / "sketch"), "--output", str(tmp_path / "out.csv")]
    assert main(words) == 0
    assert "40 predictions as of target 'sketch'" in capsys.readouterr().out
    assert main([*words, "--domain", "photo"]) == 0
    assert "40 predictions as of source 'photo'" in capsys.readouterr().out
    assert main([*words, "--domain=skecth"]) == 2
    assert "--domain=skecth is not a domain of the run; allowed: photo, sketch" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_predict_names_the_file_it_cannot_read(finished: Path, tmp_path: Path, capsys, kind: str) -> None:
    bad = tmp_path / "bad.png"
    if kind == "broken":
        bad.write_bytes(b"\x89PNG but no image")
    assert main(["predict", str(finished), "--data.inputs", str(bad), "--output", str(tmp_path / "o.csv")]) == 1
    assert str(bad) in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_export_gives_equal_outputs_after_reload(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", "timm", str(tmp_path / "plain")]) == 0
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    task = open_run("test", [str(finished)]).task
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # another memory layout takes other kernels: equal to rounding
        torch.testing.assert_close(
            plain(pixels), task.backbone({"pixel_values": pixels}).features, atol=1e-5, rtol=1e-5
        )
    from safetensors.torch import load_file

    heads = load_file(tmp_path / "plain" / "heads.safetensors")
    assert torch.equal(heads["photo.weight"], task.heads["photo"][1].weight)
    assert json.loads((tmp_path / "plain" / "heads.json").read_text())[1]["labels"] == ["cat", "dog"]


def test_export_refuses_the_other_form_and_a_full_folder(finished: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(finished), "--to", "hf", str(tmp_path / "hf")]) == 2
    assert "--to timm" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(finished), "--to", "timm", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err


NO_PAPER = {
    "methods": {"Compile", "Freeze", "PrefixCache", "RankSentinel"},
    "backbones": set(),
    "tasks": {"Classification", "Regression"},
}
"""What is older than any paper to name, or is a tool."""


@pytest.mark.parametrize(("kind", "name"), [("methods", "L2SP"), ("backbones", "Transformer"), ("tasks", "Regression")])
def test_list_finds_every_public_class(kind: str, name: str, capsys) -> None:
    assert main(["list", kind]) == 0
    printed = capsys.readouterr().out
    entries = {entry[0]: entry for entry in found(kind)}
    assert name in entries
    assert all(path in printed and text for _, path, text in entries.values())
    undated = {name for name, (_, _, text) in entries.items() if not re.search(r"\b(19|20)\d\d\b", text)}
    assert undated == NO_PAPER[kind]
    package = importlib.import_module(entries[name][1].rpartition(".")[0])
    base = {"methods": Callback, "backbones": Backbone, "tasks": Task}[kind]
    assert issubclass(getattr(package, name), base)
    assert "Phase" not in entries


def test_compare_leaves_the_source_leg_out(runs: Path, tmp_path: Path, capsys) -> None:
    assert main(["compare", str(runs), "--output", str(tmp_path / "table.md")]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "full" in table
    assert "source-" not in table
    assert "photo" in capsys.readouterr().out


LIGHT = """
import sys
from crossft.cli import main
for line in ("--help", "list --help", "list methods", "resume --help", "predict --help", "nope"):
    main(line.split())
heavy = {"torch", "lightning", "pandas", "transformers", "timm", "jsonargparse"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def test_help_and_list_import_nothing_heavy_and_are_quick() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("[]"), done.stderr
    assert "unknown command 'nope'" in done.stderr

    def seconds(*words: str) -> float:
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            spent.append(time.perf_counter() - start)
        return min(spent)

    assert seconds("-m", "crossft.cli", "--help") < 10 * seconds("-c", "pass")


def test_no_command_and_an_unknown_one_are_usage_errors(capsys) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out
    assert main(["fti"]) == 2
    assert "fit" in capsys.readouterr().err
    assert main(["--version"]) == 0


class Starts(Callback):
    """Says, as a command does, that no earlier run has trained a head."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.known_heads = frozenset()


def test_a_checkpoint_says_which_of_its_heads_were_trained(tmp_path: Path) -> None:
    """A source that is not trained on has a head of random weights, of which no later run may say that it knows it."""
    root = retention_cases.images(tmp_path / "images")
    data = retention_cases.data_of(root, source="art")
    kept = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    retention_cases.fit(data, {}, extra=(Starts(), Checkpoints(tmp_path / "run")), **kept)
    file = RunFolder(tmp_path / "run").last
    task = Classification(TinyVision(), list(data.domains))
    trained, new = (task.head_keys[name] for name in ("sketch", "art"))
    assert load_weights(task, file) == {trained, new}
    assert task.known_heads == {trained}
    check_known(task, [trained], "x")
    with pytest.raises(ConfigError, match="x reads the head of art, which nothing has trained yet"):
        check_known(task, [new], "x")
    checkpoint = load_checkpoint(file)
    torch.save({**checkpoint, "known_heads": [["another"]]}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="malformed known_heads"):
        load_weights(task, tmp_path / "other.ckpt")
