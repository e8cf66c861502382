"""A program of its own, which forks two processes for each run: see ``test_fsdp2.py``. Arguments: folder, data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from reliability.harness import launched

import crossft.callbacks.adaptation
import crossft.callbacks.monitoring
import crossft.cli.fit  # noqa: F401 (imported before forking)
from crossft.backbones import Timm
from crossft.cli import main

TRAINER = Path(__file__).parents[2] / "configs" / "trainer"


def config(folder: Path, data: Path) -> Path:
    """A chain with dropout, a method with weights of its own, stages that are frozen, clipping and a schedule."""
    backbone = {"name": "test_vit", "weights": None, "image_size": 32}
    whole: dict[str, Any] = {
        "experiment": "tiny",
        "model": {
            "class_path": "crossft.tasks.Classification",
            "init_args": {
                "backbone": {"class_path": "crossft.backbones.Timm", "init_args": backbone},
                # a key's bias has no gradient but rounding, which Adam would make a step of
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "eps": 0.0001}},
                "schedule": {"class_path": "crossft.optim.Cosine", "init_args": {"warmup": 2}},
                "head_dropout": 0.1,
            },
        },
        "data": {
            "root": str(data), "source": "photo", "target": "sketch", "train_on": ["source", "target"],
            "target_labels": "none", "batch_size": 4, "splits": [0.5, 0.25, 0.25], "split": "stratified",
        },
        "trainer": {
            "accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": 0.5, "log_every_n_steps": 5,
            "callbacks": [{"class_path": "interrupting.StopAt"}],
        },
        "methods": {
            "dann": {"class_path": "crossft.callbacks.adaptation.DANN", "init_args": {"hidden": 8}},
            "freeze": {"class_path": "crossft.callbacks.freezing.Freeze", "init_args": {"train_last": 4}},
        },
        "select": {"metric": "target/val/infomax", "oracle": True},
        "wandb": {"mode": "disabled"},
        "source_leg": {"trainer": {"max_epochs": 1}, "select": {"metric": "source/val/accuracy", "oracle": False}},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def runs(folder: Path, data: Path) -> dict[str, int]:
    """Exit codes: DDP's chain, FSDP2's, and its target leg again, stopped by a signal and resumed."""
    path = config(folder, data)

    def fit(kind: str, *more: str) -> list[str]:
        files = [f"--config={path}", f"--config={TRAINER / kind}.yaml", "--trainer.accelerator=cpu"]
        return ["fit", *files, "--allow=interrupting", f"--run.root={folder / kind}", *more]

    stopped = f"--run.dir={folder / 'stopped'}"
    codes = {kind: launched(2, {}, lambda kind=kind: main(fit(kind))) for kind in ("ddp", "fsdp2")}
    signal = {"STOP_IN": "sketch", "STOP_AT": "5"}
    codes["stopped"] = launched(2, signal, lambda: main(fit("fsdp2", stopped)))
    codes["resumed"] = launched(2, {}, lambda: main(["resume", str(folder / "stopped"), "--allow=interrupting"]))
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    Timm("test_vit", weights=None, image_size=32)  # what imports lazily is imported before the forks
    (where / "codes.json").write_text(json.dumps(runs(where, Path(sys.argv[2]))))
