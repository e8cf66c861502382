"""``crossft inspect``: what it says before a run is what the run then does."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import get_args

import pytest
import timm
import yaml
from tiny import image_domains

from crossft.backbones.batchnorm import BatchNormPolicy
from crossft.cli import main
from crossft.cli.ahead import look_ahead, settings_of
from crossft.cli.inspect import foreseen_ledger
from crossft.runs import RunFolder

PHASES = [
    {"train_last": 0, "epochs": 1},
    {"train_last": 1, "steps": 2, "rates": "rewarm", "warmup": 2, "lr": 0.5},
    {"rates": "restart", "moments": "reset"},
]


def unfreezing(**arguments) -> str:
    found = {"class_path": "crossft.callbacks.freezing.GradualUnfreezing", "init_args": arguments}
    return f"--methods.unfreeze={yaml.safe_dump(found, default_flow_style=True, width=1000).strip()}"


OFF = ["--methods.freeze=null", "--methods.l2sp=null"]


def phases_of(out: str) -> list[dict[str, list[str]]]:
    """Cells by stage, of every phase that was printed."""
    parts = re.split(r"^phase \d+: .*$", out, flags=re.M)[1:]
    rows = [[line.split() for line in part.splitlines() if re.search(r" (train|frozen) ", line)] for part in parts]
    return [{cells[0]: cells[1:] for cells in part} for part in rows]


def test_inspect_counts_parameters_and_what_trains(config: Path, capsys) -> None:
    assert main(["inspect", f"--config={config}"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "," in line}
    model = timm.create_model("test_resnet", num_classes=0)
    count = sum(p.numel() for p in model.parameters())
    last = sum(p.numel() for name in ("layer3", "layer4") for p in getattr(model, name).parameters())
    assert rows["all"][:2] == [f"{count:,}", f"{last:,}"]
    assert "a head of two classes stands" in out
    assert "head.data* " in out
    assert "methods.l2sp: built from the data, so own parameters are not counted" in out


@pytest.mark.parametrize("policy", get_args(BatchNormPolicy))
def test_every_policy_is_inspected(config: Path, capsys, policy: str) -> None:
    assert main(["inspect", f"--config={config}", f"--model.batchnorm={policy}"]) == 0
    out = capsys.readouterr().out
    assert f"batchnorm: {policy};" in out
    assert float(re.search(r"([\d.]+) MFLOP a row", out).group(1)) > 0


def test_the_ledger_is_that_of_the_run(config: Path, fit, images: Path, tmp_path: Path, capsys) -> None:
    """Every row and every number, with phases, a warmup, a discriminator and accumulation."""
    flags = [
        *OFF, unfreezing(phases=PHASES), "--methods.dann=crossft.callbacks.adaptation.DANN", "--methods.dann.hidden=8",
        "--model.schedule=crossft.optim.Cosine", "--model.schedule.warmup=0.2", "--model.layer_decay=0.5",
        "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=3", "--source_leg=null", "--before=false",
    ]  # fmt: skip
    assert fit(tmp_path, *flags) == 0
    (folder,) = (tmp_path / "tiny").iterdir()
    with RunFolder(folder).ledger.open(newline="") as file:
        expected = list(csv.DictReader(file))
    named = [f"--config={config}", f"--data.root={images}", "--data.source=photo", "--data.target=sketch", *flags]
    ahead = look_ahead(settings_of(named))
    found = [row for i, phase in enumerate(ahead.plan) for row in foreseen_ledger(ahead, i, phase)]
    assert [{k: str(v) for k, v in row.items()} for row in found] == expected
    assert len({row["stage"] for row in expected if row["stage"].startswith(("head.", "term."))}) == 2
    assert not ahead.stand_in
    capsys.readouterr()
    assert main(["inspect", *named]) == 0
    printed = phases_of(capsys.readouterr().out)
    assert len(printed) == 3
    for cells, row in zip([c for part in printed for c in part.items()], expected, strict=True):
        assert cells[0] == row["stage"]
        assert cells[1][-4:] == [
            *(f"{int(row[k]):,}" for k in ("trainable", "parameters")),
            *(f"{float(row['lr']):.3g}", f"{float(row['weight_decay']):g}"),
        ]


def test_a_source_with_labels_of_its_own_has_a_head_that_does_not_train(config: Path, tmp_path: Path, capsys) -> None:
    data = image_domains(tmp_path / "data", ("photo",), size=16)
    image_domains(data, ("sketch",), ("bird", "fish", "worm"), size=16)
    named = [f"--data.root={data}", "--data.source=photo", "--data.target=sketch", *OFF]
    assert main(["inspect", f"--config={config}", *named]) == 0
    (rows,) = phases_of(capsys.readouterr().out)
    features = timm.create_model("test_resnet", num_classes=0).num_features
    heads = {name: cells for name, cells in rows.items() if name.startswith("head.")}
    assert heads["head.photo"][:3] == ["frozen", "0", f"{2 * features + 2:,}"]
    assert heads["head.sketch"][:3] == ["train", f"{3 * features + 3:,}", f"{3 * features + 3:,}"]
    probe = ["--methods.freeze=crossft.callbacks.freezing.Freeze", "--methods.freeze.train_last=0"]
    assert main(["inspect", f"--config={config}", *named, *probe]) == 0, "the head that trains is the one that counts"


def test_the_curve_and_the_phases_need_the_number_of_steps(config: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "curve.png"
    words = ["inspect", f"--config={config}", *OFF, unfreezing(phases=PHASES), "--trainer.max_epochs=3"]
    assert main([*words, f"--curve={path}"]) == 2
    assert "--curve needs the number of optimizer steps: --steps N" in capsys.readouterr().err
    assert main([*words, f"--curve={path}", "--steps=no"]) == 2
    assert "--steps no: give the number" in capsys.readouterr().err
    assert not path.exists()
    assert main([*words, f"--curve={path}", "--steps", "12"]) == 0
    out = capsys.readouterr().out
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert f"learning rates over 12 optimizer steps: {path}" in out
    titles = re.findall(r"^phase \d: .*$", out, re.M)
    assert titles == [
        "phase 0: epochs=1; from optimizer step 0 of 12, lr: there",
        "phase 1: steps=2; from optimizer step 4 of 12, lr: there",
        "phase 2: to the end; from optimizer step 6 of 12, lr: there",
    ]
    trains = [[name for name, cells in part.items() if "train" in cells[:2]] for part in phases_of(out)]
    assert [len(names) for names in trains][:2] == [1, 2]
    assert trains[0] == ["head.data*"]
    assert main(words) == 0
    assert "its steps are not known: --steps N" in capsys.readouterr().out


@pytest.mark.parametrize("data", [True, False])
def test_a_last_phase_that_is_never_entered_is_refused(config: Path, images: Path, capsys, data: bool) -> None:
    named = [f"--data.root={images}", "--data.source=photo", "--data.target=sketch"] if data else []
    words = ["inspect", f"--config={config}", *named, *OFF]
    assert main([*words, unfreezing(phases=PHASES), "--trainer.max_epochs=1"]) == (2 if data else 0)
    assert main([*words, unfreezing(every={"epochs": 1}), "--trainer.max_epochs=2"]) == 2
    assert "methods.unfreeze: the last of" in capsys.readouterr().err
    patient = unfreezing(every={"patience": 1}, by=3, monitor="target/val/loss", mode="min")
    assert main([*words, patient, "--trainer.max_epochs=2"]) == (2 if data else 0)
    assert main([*words, patient, "--trainer.max_epochs=5"]) == 0
    if data:
        assert "phase 2: patience=1; from optimizer step" in capsys.readouterr().out
