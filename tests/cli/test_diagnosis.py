"""What was forgotten, split into the part of BatchNorm's statistics and the part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny import image_domains

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.metrics.diagnosis import Split, remedy, split_forgetting
from crossft.runs import RunFolder, read_json


def test_the_parts_are_known_where_one_cause_acts_alone_and_add_up() -> None:
    assert split_forgetting(0.9, 0.3, 0.9, 0.3) == Split(0.6, 0.0)  # putting the statistics back mends all
    assert split_forgetting(0.9, 0.3, 0.3, 0.9) == Split(0.0, 0.6)
    both = split_forgetting(0.9, 0.2, 0.5, 0.6)
    assert both == Split(0.3, 0.4)
    assert both.total == pytest.approx(0.7)
    assert split_forgetting(1.0, 3.0, 1.5, 2.0, higher_is_better=False) == Split(1.25, 0.75)


@pytest.mark.parametrize(
    ("numbers", "own", "expected"),
    [
        ((0.9, 0.9, 0.9, 0.9), None, "none"),
        ((0.9, 0.3, 0.35, 0.9), None, "weights"),
        ((0.9, 0.3, 0.85, 0.3), 0.85, "frozen"),
        ((0.9, 0.3, 0.75, 0.3), 0.88, "per_domain"),
        ((0.9, 0.2, 0.5, 0.6), 0.5, "frozen+weights"),
        ((0.9, 0.2, 0.5, 0.6), 0.6, "per_domain+weights"),
    ],
)
def test_the_remedy_fits_the_cause(numbers: tuple[float, ...], own: float | None, expected: str) -> None:
    assert remedy(split_forgetting(*numbers), numbers[0], numbers[2], own) == expected


CONFIG = {
    "experiment": "split",
    "model": {
        "class_path": "crossft.tasks.Classification",
        "init_args": {
            "backbone": {"class_path": "tiny.TinyVision", "init_args": {"batchnorm": True}},
            "batchnorm": "training",
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        },
    },
    "data": {"train_on": "target", "batch_size": 8, "augment": "none", "source": "photo", "target": "sketch"},
    "trainer": {"max_epochs": 4, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    "wandb": {"mode": "disabled"},
    "source_leg": {},
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a leg; all start from one source model. Returns its folder."""
    folder = tmp_path_factory.mktemp("split")
    image_domains(folder / "images", ("photo", "art", "cartoon", "sketch"), each=30)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    given = [f"--config={folder / 'config.yaml'}", f"--data.root={folder / 'images'}", f"--run.root={folder}"]

    def run(name: str, *flags: str) -> Path:
        start = [f"--init={folder / 'source'}"] if name != "source" else []
        assert main(["fit", *given, "--allow=tiny", *start, *flags, f"--run.dir={folder / name}"]) == 0
        return folder / name

    run("source", "--data.target=null", "--data.train_on=source", "--source_leg=null")
    return run


STILL = "--model.optimizer.lr=0.0"
"""Weights that do not move: all that the source loses, it loses to the statistics."""


def test_where_only_the_statistics_move_they_are_the_cause(fit: Callable[..., Path], capsys) -> None:
    folder = fit("still", STILL)
    found = read_json(folder / "batchnorm.json")["source"]
    metrics = RunFolder(folder).summary()["metrics"]
    assert found["before"] == metrics["source/test/accuracy/before"]
    assert found["after"] == metrics["source/test/accuracy"]
    assert found["before"] > found["after"] + 0.1, "nothing was forgotten"
    assert found["start_statistics"] == found["before"]
    assert found["new_statistics"] == found["after"]
    assert found["statistics"] == pytest.approx(found["before"] - found["after"])
    assert found["weights"] == 0.0
    assert found["own_statistics"] == pytest.approx(found["before"], abs=0.15)
    assert found["remedy"] in ("frozen", "per_domain")
    assert metrics["source/batchnorm/statistics"] == found["statistics"]
    assert "model.batchnorm=" in capsys.readouterr().out


def test_the_run_is_the_one_without_the_diagnosis(fit: Callable[..., Path]) -> None:
    both = [fit("with"), fit("without", "--diagnose=false")]
    one, other = (RunFolder(p).summary() for p in both)
    found = read_json(both[0] / "batchnorm.json")["source"]
    assert found["statistics"] + found["weights"] == pytest.approx(found["before"] - found["after"])
    assert not (both[1] / "batchnorm.json").exists()
    assert {k: v for k, v in one["metrics"].items() if "/batchnorm/" not in k} == other["metrics"]
    assert one["config_hash"] == other["config_hash"]
    a, b = (load_checkpoint(p / "checkpoints" / "last.ckpt")["state_dict"] for p in both)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (both[0] / "confusion" / "photo.csv").read_text() == (both[1] / "confusion" / "photo.csv").read_text()


def test_frozen_statistics_cost_no_evaluation(fit: Callable[..., Path], monkeypatch) -> None:
    import crossft.cli.leg as leg

    calls: list[str] = []
    real = leg.measure
    monkeypatch.setattr(leg, "measure", lambda *a, **k: calls.append("") or real(*a, **k))
    fit("first", "--model.batchnorm=frozen")  # what the start knows is measured once and kept for the two below
    calls.clear()
    fit("off", "--model.batchnorm=frozen", "--diagnose=false")
    least = len(calls)
    calls.clear()
    folder = fit("frozen", "--model.batchnorm=frozen")
    assert len(calls) == least > 0
    assert not (folder / "batchnorm.json").exists()
    assert not any("/batchnorm/" in k for k in RunFolder(folder).summary()["metrics"])


def test_statistics_of_each_domain_go_on_from_any_run(fit: Callable[..., Path], capsys) -> None:
    """From one set of statistics, from sets of other domains, and never to one set again."""
    own = "--model.batchnorm=per_domain"
    first = fit("own", own)
    before, after = (RunFolder(first).summary()["metrics"][f"source/test/accuracy{x}"] for x in ("/before", ""))
    assert (
        before
        == RunFolder(fit("frozen-too", "--model.batchnorm=frozen")).summary()["metrics"]["source/test/accuracy/before"]
    )
    state = load_checkpoint(first / "checkpoints" / "last.ckpt")["state_dict"]
    mean, base = (state[f"backbone.middle.1.{name}running_mean"] for name in ("", "base."))
    assert torch.equal(mean[0], base), "the source's statistics are those it was trained with"
    assert not torch.equal(mean[1], base)
    third = fit("third", own, f"--init={first}", "--data.source=sketch", "--data.target=art")
    state = load_checkpoint(third / "checkpoints" / "last.ckpt")["state_dict"]
    now = state["backbone.middle.1.running_mean"]
    assert torch.equal(now[0], mean[1]), "the sketches' go on under their name"
    assert not torch.equal(now[1], base)
    assert state["backbone.middle.1.seen"].tolist()[1] > 0
    with pytest.raises(AssertionError):
        fit("back", "--model.batchnorm=training", f"--init={first}")
    assert "model.batchnorm=per_domain, and has no statistics for all; set it here too" in capsys.readouterr().err
    assert after > 0
