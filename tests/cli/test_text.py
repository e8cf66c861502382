"""Texts and text pairs from the command line: a chain of legs, test, predict, adaptation, several labels a row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from backbones.tiny_models import text_folder

from crossft.cli import main
from crossft.cli.saved import open_run
from crossft.runs import RunFolder, read_json


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a word-level model, and two domains of text pairs: the second text says which label."""
    folder = tmp_path_factory.mktemp("text")
    text_folder("bert", folder / "bert")
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for domain, own in (("books", range(2, 18)), ("kitchen", range(18, 34))):
        rows = []
        for i in range(60):
            words = [f"w{w}" for w in rng.choice(list(own), rng.integers(3, 9))]
            rows.append({"text": " ".join(words), "text_pair": f"w{i % 2} {words[0]}", "label": ("bad", "good")[i % 2]})
        pd.DataFrame(rows).to_csv(folder / "data" / f"{domain}.csv", index=False)
    backbone = {"name": str(folder / "bert"), "weights": None, "max_length": 24}
    config = {
        "experiment": "text",
        "model": {
            "class_path": "crossft.tasks.Classification",
            "init_args": {
                "backbone": {"class_path": "crossft.backbones.Transformer", "init_args": backbone},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            },
        },
        "data": {"root": str(folder / "data"), "batch_size": 8},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
        "wandb": {"mode": "disabled"},
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def chain(place: Path) -> Path:
    """The target leg's folder of a chain of two legs."""
    words = [f"--config={place / 'text.yaml'}", f"--run.root={place / 'runs'}", "--data.source=books"]
    words += ["--methods.l2sp=crossft.callbacks.retention.L2SP", "--source_leg={trainer: {max_epochs: 6}}"]
    assert main(["fit", *words, "--data.target=kitchen", "--arm=chain"]) == 0
    (folder,) = (place / "runs" / "text").glob("chain-*")
    return folder


def test_a_chain_of_two_legs_knows_its_gain_and_retention(chain: Path) -> None:
    summary = RunFolder(chain).summary()
    metrics = summary["metrics"]
    (source,) = chain.parent.glob("source-*")
    assert summary["parent"] == str(source)
    learned = RunFolder(source).summary()["metrics"]["source/test/accuracy"]
    assert metrics["source/test/accuracy/before"] == pytest.approx(learned)
    for role in ("source", "target"):
        before, after = metrics[f"{role}/test/accuracy/before"], metrics[f"{role}/test/accuracy"]
        assert metrics[f"{role}/gain"] == pytest.approx(after - before)
        if role == "source":
            assert metrics["source/retention"] == (None if before == 0 else pytest.approx(after / before))


def test_test_measures_what_the_summary_says(chain: Path, tmp_path: Path) -> None:
    assert main(["test", str(chain), "--output", str(tmp_path / "test.json")]) == 0
    found, summary = json.loads((tmp_path / "test.json").read_text()), RunFolder(chain).summary()["metrics"]
    assert {"source/test/accuracy", "target/test/accuracy"} <= found.keys()
    assert found == {k: pytest.approx(summary[k]) for k in found}


def test_predict_reads_pairs_in_their_order(chain: Path, place: Path, tmp_path: Path) -> None:
    pairs = pd.read_csv(place / "data" / "kitchen.csv")[["text", "text_pair"]][::-4]
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    words = ["--data.inputs", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "out.csv")]
    assert main(["predict", str(chain), *words]) == 0
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == ["input", "predicted", "p_bad", "p_good"]
    assert [v.rsplit(": ", 1)[1] for v in table["input"]] == [f"row {i}" for i in range(1, len(pairs) + 1)]
    task = open_run("predict", [str(chain)]).task
    tokenizer = task.backbone.input_spec.tokenizer
    tokens = tokenizer(list(pairs["text"]), list(pairs["text_pair"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = task(dict(tokens)).softmax(1)[:, 1]
    assert torch.allclose(torch.tensor(table["p_good"].to_numpy(), dtype=torch.float32), expected, atol=1e-5)


def test_adapt_quarantines_bad_rows_and_lists_them(place: Path, tmp_path: Path) -> None:
    for name in ("books", "kitchen"):
        frame = pd.read_csv(place / "data" / f"{name}.csv")
        frame.loc[6, "text"] = "" if name == "kitchen" else frame.loc[6, "text"]
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    run = tmp_path / "run"
    words = [f"--config={place / 'text.yaml'}", f"--data.root={tmp_path}", "--data.source=books", f"--run.dir={run}"]
    words += ["--data.target=kitchen", "--data.train_on=source", "--data.target_labels=none", "--trainer.max_epochs=1"]
    words += ["--methods.dann=crossft.callbacks.adaptation.DANN", "--data.on_error=quarantine"]
    assert main(["fit", *words]) == 1, "one of 60 rows is more than the share that is allowed"
    assert main(["fit", *words, "--data.max_bad=0.02"]) == 0
    (row,) = read_json(run / "quarantine.json")
    assert row == {"domain": "kitchen", "where": f"{tmp_path / 'kitchen.csv'}: row 7", "reason": "empty text"}
    splits = read_json(run / "splits.json")["kitchen"]
    assert sum(len(splits[s]) for s in ("train", "val", "test")) == 59
    assert RunFolder(run).summary()["metrics"]["target/test/accuracy"] is not None


def test_several_labels_a_row(place: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(place / "data" / "books.csv").drop(columns="text_pair")
    names = [["odd", "even"][i % 2] + ("|third" if i % 3 == 0 else "") for i in range(len(frame))]
    frame["text"] += [" w0" * (i % 2) + " w1" * (i % 3 == 0) for i in range(len(frame))]
    frame.assign(label=names).to_csv(tmp_path / "books.csv", index=False)
    run = tmp_path / "run"
    words = [f"--config={place / 'text.yaml'}", f"--data.root={tmp_path}", "--data.target=books", f"--run.dir={run}"]
    assert main(["fit", *words, "--data.kind=multilabel", "--trainer.max_epochs=1"]) == 0
    assert 0 <= RunFolder(run).summary()["metrics"]["target/test/macro_f1"] <= 1
    out = tmp_path / "out.parquet"
    assert main(["predict", str(run), "--data.inputs", str(tmp_path / "books.csv"), "--output", str(out)]) == 0
    table = pd.read_parquet(out)
    columns = ["p_even", "p_odd", "p_third"]
    assert list(table.columns) == ["input", "predicted", *columns]
    for predicted, row in zip(table["predicted"], table[columns].to_numpy()):
        chosen = [n for n, p in zip(("even", "odd", "third"), row) if p >= 0.5]
        assert predicted == "|".join(chosen)
    assert (table[columns].sum(axis=1) - 1).abs().max() > 1e-3, "independent of each other"
