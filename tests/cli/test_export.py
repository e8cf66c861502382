"""An exported run, read with timm, transformers and safetensors alone, predicts what the run predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from backbones.tiny_models import text_folder
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor

from crossft.cli import main


def trained(folder: Path, task: str, backbone: dict[str, Any], target: str) -> Path:
    """The run folder of one epoch on ``folder/TARGET.csv``."""
    config = {
        "experiment": "export",
        "model": {"class_path": f"crossft.tasks.{task}", "init_args": {"backbone": backbone, "head_dropout": 0.1}},
        "data": {"root": str(folder), "target": target, "train_on": "target", "batch_size": 8},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
        "wandb": {"mode": "disabled"},
        "run": {"root": str(folder / "runs")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0
    (run,) = {path.parent for path in (folder / "runs").rglob("config.yaml")}
    return run


def predicted(run: Path, inputs: list[Path], out: Path, *flags: str) -> pd.DataFrame:
    assert main(["predict", str(run), "--data.inputs", *map(str, inputs), "--output", str(out), *flags]) == 0
    return pd.read_csv(out)


def head(folder: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    (entry,) = json.loads((folder / "heads.json").read_text())
    tensors = load_file(folder / "heads.safetensors")
    return tensors[f"{entry['head']}.weight"], tensors[f"{entry['head']}.bias"], entry


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A regression on images, values near 125, and the images."""
    folder = tmp_path_factory.mktemp("regression")
    rng = np.random.default_rng(0)
    images, lines = [], ["image,label"]
    for i in range(40):
        images.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(images[-1])
        lines.append(f"{i}.png,{125 + 9 * rng.standard_normal():.4f}")
    (folder / "weight.csv").write_text("\n".join(lines) + "\n")
    options = {"name": "test_resnet", "weights": None, "image_size": 32}
    backbone = {"class_path": "crossft.backbones.Timm", "init_args": options}
    return trained(folder, "Regression", backbone, "weight"), images[:5]


@pytest.mark.parametrize("pooling", ["model", "max"])
def test_regression_in_label_units(weighed: tuple[Path, list[Path]], tmp_path: Path, pooling: str) -> None:
    run, files = weighed
    flags = [] if pooling == "model" else [f"--model.init_args.backbone.init_args.pooling={pooling}"]
    expected = predicted(run, files, tmp_path / "out.csv", *flags)["predicted"]
    assert main(["export", str(run), "--to", "timm", str(tmp_path / "plain"), *flags]) == 0

    weight, bias, entry = head(tmp_path / "plain")
    net = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(net)
    transform = create_transform(**config, is_training=False)
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        pooled = net.forward_features(pixels).amax((2, 3), keepdim=True)
        features = net(pixels) if pooling == "model" else net.forward_head(pooled, pre_logits=True)
        values = (features @ weight.T + bias)[:, 0]
    assert (entry["pooling"], entry["output"], entry["image_size"]) == (pooling, "none", [32, 32])
    assert values.mean() > 90
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_text_classes(tmp_path: Path) -> None:
    import transformers

    texts = [f"w{i % 30} w{i % 7} " + "w3 " * (i % 5) + f"w{30 + i % 2}" for i in range(60)]
    lines = [f"{text},{('bad', 'good')[i % 2]}" for i, text in enumerate(dict.fromkeys(texts))]
    (tmp_path / "books.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(texts[:5]) + "\n")
    options = {"name": str(text_folder("bert", tmp_path / "bert")), "weights": None, "max_length": 6}
    backbone = {"class_path": "crossft.backbones.Transformer", "init_args": options}
    run = trained(tmp_path, "Classification", backbone, "books")
    expected = predicted(run, [tmp_path / "new.csv"], tmp_path / "out.csv")
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "plain")]) == 0

    weight, bias, entry = head(tmp_path / "plain")
    net = transformers.AutoModel.from_pretrained(tmp_path / "plain").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    inputs = tokenizer(texts[:5], padding=True, truncation=True, max_length=entry["max_length"], return_tensors="pt")
    mask = inputs["attention_mask"][..., None].float()
    with torch.no_grad():
        tokens = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        features = (tokens * mask).sum(1) / mask.sum(1)
        values = (features @ weight.T + bias).softmax(1)
    assert (entry["pooling"], entry["output"], entry["max_length"]) == ("mean", "softmax", 6)
    assert entry["labels"] == ["bad", "good"]
    assert np.allclose(values.numpy(), expected[["p_bad", "p_good"]].to_numpy(), atol=1e-5)
