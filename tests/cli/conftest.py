"""One small data set, one config, and one finished chain (source leg, target leg) for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import image_domains

from crossft.cli import main

CONFIG = {
    "experiment": "tiny",
    "model": {
        "class_path": "crossft.tasks.Classification",
        "init_args": {
            "backbone": {
                "class_path": "crossft.backbones.Timm",
                "init_args": {"name": "test_resnet", "weights": None, "image_size": 32},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "data": {"train_on": "target", "batch_size": 8},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    "wandb": {"mode": "disabled"},
    "methods": {
        "l2sp": {"class_path": "crossft.callbacks.retention.L2SP", "init_args": {"weight": 0.01}},
        "freeze": {"class_path": "crossft.callbacks.freezing.Freeze", "init_args": {"train_last": 2}},
    },
    "source_leg": {"trainer": {"max_epochs": 1}},
}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images") / "data", ("photo", "sketch", "cartoon"), each=20, size=16)


@pytest.fixture(scope="session")
def fit(config: Path, images: Path) -> Callable[..., int]:
    """Run ``crossft fit`` in this process on the small data; the first argument is the root of the runs."""

    def run(root: Path, *flags: str, target: str = "sketch") -> int:
        named = [f"--data.root={images}", "--data.source=photo", f"--data.target={target}", f"--run.root={root}"]
        return main(["fit", f"--config={config}", *named, *flags])

    return run


@pytest.fixture(scope="session")
def runs(fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's folder after one command: a source leg and a target leg."""
    root = tmp_path_factory.mktemp("runs")
    assert fit(root, "--data.shots=5", "--arm=full") == 0
    return root / "tiny"


@pytest.fixture(scope="session")
def finished(runs: Path) -> Path:
    """The target leg's folder."""
    (folder,) = runs.glob("full-*")
    return folder
