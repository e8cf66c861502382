"""The four shipped configs on real data with real weights, as README shows them: whole folders, better than chance."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from crossft.cli import main
from crossft.runs import RunFolder

IMAGES, TEXTS = ("pacs-96", "photo", "sketch"), ("amazon4-airline", "books", "kitchen")
RUNS = [("vision/domains", IMAGES, ["--data.shots", "10"]), ("text/domains", TEXTS, [])]
RUNS += [("vision/adapt", IMAGES, []), ("text/adapt", TEXTS, [])]


def majority(folder: Path, domain: str) -> float:
    """Share of the largest class of the test split: the accuracy of always naming it."""
    counts = pd.read_csv(folder / "confusion" / f"{domain}.csv", index_col=0).to_numpy().sum(1)
    return float(counts.max() / counts.sum())


def inputs(root: Path, data: str, target: str) -> list[str]:
    """Five images of the target, or its table."""
    return [str(p) for p in sorted((root / data / target).rglob("*.jpg"))[:5]] or [str(root / data / f"{target}.jsonl")]


@pytest.mark.soak
@pytest.mark.data
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("config", "domains", "flags"), RUNS, ids=[r[0] for r in RUNS])
def test_shipped_config(config, domains, flags, shared_data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    data, source, target = domains
    place = [f"--data.root={shared_data / data}", f"--data.source={source}", f"--data.target={target}"]
    folder, extra = RunFolder(tmp_path / "run"), ["--trainer.enable_progress_bar=false", f"--run.root={tmp_path}"]
    settings = ["--config", f"configs/{config}.yaml", *place, *flags, f"--run.dir={folder.path}", *extra]
    allow = ["--allow=interrupting"] if config == "text/domains" else []
    if allow:  # stopped in the target leg, and gone on with
        monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "cli"))
        monkeypatch.setenv("STOP_IN", "target")
        monkeypatch.setenv("STOP_AT", "5")
        assert main(["fit", *settings, *allow, "--trainer.callbacks=interrupting.StopAt"]) != 0
        assert folder.summary()["status"] == "interrupted"
        monkeypatch.delenv("STOP_AT")
        assert main(["resume", str(folder.path), *allow]) == 0
    else:
        assert main(["fit", *settings]) == 0
    summary = folder.summary()
    metrics = summary["metrics"]
    with capsys.disabled():
        print(config, {k: v for k, v in metrics.items() if "accuracy" in k or "gain" in k or "retention" in k})
    assert summary["status"] == "finished"
    assert metrics["target/test/accuracy"] > majority(folder.path, target) + 0.1
    assert metrics["source/test/accuracy"] > majority(folder.path, source) + 0.1
    if config.endswith("domains"):
        assert metrics["target/gain"] > 0
        assert 0.5 < metrics["source/retention"] < 1.5
    for name in ("config.yaml", "metrics.csv", "ledger.csv", "splits.json", "before.json", "checkpoints/last.ckpt"):
        assert (folder.path / name).is_file(), name
    assert list((folder.path / "figures").glob("*.png"))
    assert list((folder.path / "wandb").glob("offline-run-*"))

    assert main(["resume", str(folder.path), *allow]) == 0  # nothing is left to do, and it says so
    assert main(["test", str(folder.path), *allow]) == 0
    assert f"{metrics['target/test/accuracy']:.3f}" in capsys.readouterr().out
    out = tmp_path / "out.csv"
    files = inputs(shared_data, data, target)
    assert main(["predict", str(folder.path), *allow, "--data.inputs", *files, "--output", str(out)]) == 0
    assert len(pd.read_csv(out)) == (5 if files[0].endswith(".jpg") else 2000)
    shutil.rmtree(folder.path)
