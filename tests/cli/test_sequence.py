"""``crossft fit --sequence``: one command, a chain of legs, one matrix; stopped anywhere it ends in the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import image_domains

from crossft.callbacks.monitoring import load_checkpoint
from crossft.callbacks.retention.importance import Importance
from crossft.cli import main
from crossft.metrics.transfer import backward_transfer, forgetting, forward_transfer
from crossft.reports.records import headline, leaves, read_records
from crossft.runs import RunFolder, read_json

METHODS = {
    "ewc": {"class_path": "crossft.callbacks.retention.EWC", "init_args": {"weight": 5.0}},
    "online": {"class_path": "crossft.callbacks.retention.OnlineEWC", "init_args": {"weight": 5.0, "decay": 0.5}},
    "mas": {"class_path": "crossft.callbacks.retention.MAS"},
    "si": {"class_path": "crossft.callbacks.retention.SI"},
    "replay": {"class_path": "crossft.callbacks.retention.Replay", "init_args": {"size": 10, "share": 0.25}},
    "agem": {"class_path": "crossft.callbacks.retention.AGEM", "init_args": {"size": 8, "batch_size": 4}},
}
BACKBONE = {"class_path": "tiny.TinyVision", "init_args": {"width": 8}}
CONFIG = {
    "experiment": "chain",
    "arm": "all",
    "model": {
        "class_path": "crossft.tasks.Classification",
        "init_args": {
            "backbone": BACKBONE,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {"batch_size": 8, "augment": "none"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    "wandb": {"mode": "disabled"},
    "checkpoints": {"every_n_steps": 2},
    "methods": METHODS,
    "source_leg": {"methods": {"si": METHODS["si"]}, "trainer": {"max_epochs": 2}},
}
DOMAINS = ["photo", "sketch", "cartoon"]
ALLOW = ["--allow=tiny", "--allow=interrupting", "--trainer.callbacks=interrupting.StopAt"]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    folder = tmp_path_factory.mktemp("sequence")
    images = image_domains(folder / "images", ("photo", "cartoon"), each=60, signal=18)
    # the classes change places there, so the others are forgotten
    image_domains(images, ("x", "y", "sketch"), classes=("dog", "cat"), each=60, signal=18)
    config = folder / "chain.yaml"
    config.write_text(yaml.safe_dump(CONFIG))

    def run(root: Path, *flags: str, data: Path = images) -> int:
        named = [f"--data.root={data}", f"--run.root={root}", f"--sequence={','.join(DOMAINS)}"]
        return main(["fit", f"--config={config}", *ALLOW, *named, *flags])

    run.images = images
    return run


@pytest.fixture(scope="module")
def whole(fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert fit(root) == 0
    (folder,) = (root / "chain").glob("all-*")
    return folder


def test_each_leg_is_a_run_that_starts_from_the_one_before(whole: Path) -> None:
    first, second = whole / "1-sketch", whole / "2-cartoon"
    source = next(whole.parent.glob("source-*"))
    assert Path(RunFolder(first).summary()["parent"]) == source
    assert Path(RunFolder(second).summary()["parent"]) == first
    assert RunFolder(first).summary()["domains"] == {"source": ["photo"], "target": ["sketch"], "eval": ["cartoon"]}
    assert RunFolder(second).summary()["domains"] == {"source": ["photo", "sketch"], "target": ["cartoon"]}
    splits = [read_json(p / "splits.json") for p in (source, first, second, whole)]
    assert splits[1] == splits[2] == splits[3]
    assert splits[0]["photo"] == splits[3]["photo"]


def test_the_matrix_is_what_the_legs_measured(whole: Path) -> None:
    found = read_json(whole / "sequence.json")
    first, second = RunFolder(whole / "1-sketch"), RunFolder(whole / "2-cartoon")
    before, after = first.summary()["metrics"], second.summary()["metrics"]
    assert found["domains"] == DOMAINS
    assert found["metric"] == "accuracy"
    R = found["matrix"]
    assert R[0] == [
        before["source/test/accuracy/before"],
        before["target/test/accuracy/before"],
        before["cartoon/test/accuracy/before"],
    ]
    assert R[1] == [before[f"{n}/test/accuracy"] for n in ("source", "target", "cartoon")]
    assert R[2] == [after[f"{n}/test/accuracy"] for n in ("photo", "sketch", "target")]
    # a leg ends where the next begins
    starts = [after[f"{n}/test/accuracy/before"] for n in ("photo", "sketch", "target")]
    assert starts == pytest.approx(R[1])
    assert found["acc"] == pytest.approx(sum(R[2]) / 3)
    assert found["bwt"] == pytest.approx(((R[2][0] - R[0][0]) + (R[2][1] - R[1][1])) / 2)
    assert found["learning_accuracy"] == pytest.approx((R[0][0] + R[1][1] + R[2][2]) / 3)
    expected = (max(R[0][0], R[1][0]) - R[2][0] + max(R[0][1], R[1][1]) - R[2][1]) / 2
    assert found["forgetting"] == pytest.approx(expected)
    assert len({v for row in R for v in row}) > 3, "the numbers above are not told apart"
    b = found["baseline"]
    assert found["fwt"] == pytest.approx((R[0][1] - b[1] + R[1][2] - b[2]) / 2)
    assert "Chaudhry" in found["variants"]["forgetting"]
    assert [(whole / run).is_dir() for run in found["runs"]] == [True] * 3


def test_compare_reads_a_sequence_as_one_run(whole: Path, tmp_path: Path, capsys) -> None:
    records = read_records([whole.parent])
    (run,) = leaves(records).to_dict("records")
    numbers = read_json(whole / "sequence.json")
    assert run["sequence/acc"] == numbers["acc"]
    assert (run["source"], run["target"]) == ("photo", "sketch+cartoon")
    assert run["source/retention"] == pytest.approx(numbers["matrix"][2][0] / numbers["matrix"][0][0])
    assert headline(leaves(records))[0] == "sequence/acc"
    assert main(["compare", str(whole.parent)]) == 0
    assert "sequence" in capsys.readouterr().out


def test_importance_and_memories_are_carried(whole: Path) -> None:
    def kept(leg: str, name: str) -> Importance:
        return Importance.load(whole / leg / "anchors" / f"{name}.safetensors")

    name = "last.0.weight"
    for method in ("ewc", "online", "mas"):
        first, second = kept("1-sketch", method), kept("2-cartoon", method)
        assert first.provenance["domains"] == ["photo"]
        assert second.provenance["domains"] == ["photo", "sketch"]
        decay = 0.5 if method == "online" else 1.0
        assert (second.values[name] >= decay * first.values[name] - 1e-12).all()
        assert second.values[name].sum() > first.values[name].sum() * decay
    held, state = kept("2-cartoon", "ewc"), load_checkpoint(whole / "1-sketch" / "checkpoints" / "last.ckpt")
    old, here, n = kept("1-sketch", "ewc"), state["state_dict"][f"backbone.{name}"], name
    fresh = held.values[n] - old.values[n]
    # two penalties, each with its own anchor, have the gradient of the one that is kept
    w = torch.randn_like(here)
    apart = old.values[n] * (w - old.anchors[n]) + fresh * (w - here)
    assert torch.allclose(held.values[n] * (w - held.anchors[n]), apart, atol=1e-5 * float(apart.abs().max()))
    recorded = kept("1-sketch", "si.final").values[n]
    assert torch.equal(kept("2-cartoon", "si").values[n], recorded)
    for method, size in (("replay", 10), ("agem", 8)):
        files = [whole / leg / "anchors" / f"{method}.memory.safetensors" for leg in ("1-sketch", "2-cartoon")]
        kept_rows = [{n: set(ids.tolist()) for n, ids in load_file(file).items()} for file in files]
        train = {n: set(splits["train"]) for n, splits in read_json(whole / "splits.json").items()}
        assert {n: len(ids) for n, ids in kept_rows[0].items()} == {"photo": size}
        assert {n: len(ids) for n, ids in kept_rows[1].items()} == {"photo": size // 2, "sketch": size // 2}
        assert kept_rows[1]["sketch"] <= train["sketch"]
        assert kept_rows[1]["photo"] < kept_rows[0]["photo"] < train["photo"], "a row came back that was forgotten"


@pytest.mark.parametrize(("role", "step"), [("sketch", "1"), ("cartoon", "3")])
def test_a_chain_stopped_in_a_leg_ends_in_the_same_bits(
    whole: Path, fit: Callable[..., int], tmp_path: Path, monkeypatch, role: str, step: str
) -> None:
    monkeypatch.setenv("STOP_IN", role)
    monkeypatch.setenv("STOP_AT", step)
    assert fit(tmp_path) == 143
    (folder,) = (tmp_path / "chain").glob("all-*")
    assert RunFolder(folder).summary()["status"] == "interrupted"
    matrix = read_json(folder / "sequence.json")["matrix"]
    assert matrix[-1] == [None] * 3
    monkeypatch.setenv("STOP_AT", "")
    within = next(folder.glob(f"*-{role}"))
    assert main(["resume", str(within), "--allow=tiny", "--allow=interrupting"]) == 0
    assert RunFolder(folder).summary()["status"] == "finished"
    mine, other = (read_json(p / "sequence.json") for p in (folder, whole))
    assert mine == {**other, "runs": mine["runs"]}
    for leg in ("1-sketch", "2-cartoon"):
        a, b = (load_checkpoint(p / leg / "checkpoints" / "last.ckpt") for p in (folder, whole))
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in b["state_dict"])


def test_domains_with_heads_of_their_own(fit: Callable[..., int], tmp_path: Path, capsys) -> None:
    """Task-incremental: what no head can answer yet is null, and forward transfer with it."""
    data = tmp_path / "data"
    shutil.copytree(fit.images, data)
    (data / "sketch" / "dog").rename(data / "sketch" / "wolf")
    off = [f"--methods.{name}=null" for name in METHODS]
    lwf = ["--methods.lwf=crossft.callbacks.retention.LwF"]
    assert fit(tmp_path, *off, *lwf, "--arm=all", data=data) == 0
    (folder,) = (tmp_path / "chain").glob("all-*")
    found = read_json(folder / "sequence.json")
    R = found["matrix"]
    assert [[v is None for v in row] for row in R] == [[False, True, False], [False] * 3, [False] * 3]
    assert found["fwt"] is None
    assert found["bwt"] == pytest.approx(backward_transfer(R))
    assert found["forgetting"] == pytest.approx(forgetting(R))
    heads = {
        k.split(".")[1]
        for k in load_checkpoint(folder / "2-cartoon/checkpoints/last.ckpt")["state_dict"]
        if "heads" in k
    }
    assert heads == {"photo", "sketch"}
    capsys.readouterr()
    assert main(["test", str(folder), "--allow=tiny", "--allow=interrupting"]) == 0
    assert json.loads(json.dumps(found["matrix"][-1]))[0] == pytest.approx(
        float(
            next(
                line for line in capsys.readouterr().out.splitlines() if "source" in line and "accuracy" in line
            ).split()[-1]
        ),
        abs=1e-3,
    )


def test_what_was_not_measured_counts_nowhere() -> None:
    R = [[0.9, None, 0.4], [0.5, 0.8, 0.6], [0.7, 0.6, 0.9]]
    assert forgetting(R) == pytest.approx((0.2 + 0.2) / 2)
    assert forward_transfer(R, [0.1, 0.1, 0.1]) is None


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--sequence=photo"], "two or more"),
        (["--sequence=photo,photo"], "each once"),
        (["--data.shots=5"], "data.shots=5"),
        (["--data.source=cartoon"], "data.source=cartoon"),
        (["--before=false"], "before=false"),
        (["--source_leg=null"], "no model to start from"),
    ],
)
def test_settings_that_a_sequence_rules_out(fit, tmp_path: Path, capsys, flags: list[str], match: str) -> None:
    assert fit(tmp_path, *flags) == 2
    assert match in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
