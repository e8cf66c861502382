"""A watched run beside its source-only run, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crossft.runs import RunFolder, read_metrics


def test_a_run_is_compared_with_the_source_only_run_beside_it(
    fit: Callable[..., int], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    flags = ["--source_leg=null", "--data.train_on=source", "--data.target_labels=none", "--before=false",
             "--methods.l2sp=null", "--trainer.max_epochs=2", "--data.splits=[0.4,0.4,0.2]",
             "--methods.health=crossft.callbacks.monitoring.Health"]  # fmt: skip
    dann = ["--methods.dann=crossft.callbacks.adaptation.DANN", "--methods.dann.weight=5"]
    assert fit(tmp_path, *flags, "--arm=source-only") == 0
    assert fit(tmp_path, *flags, "--arm=other", "--seed_everything=1", *dann) == 0
    assert fit(tmp_path, *flags, "--arm=dann", *dann) == 0
    runs = {p.name.rsplit("-", 2)[0]: RunFolder(p) for p in (tmp_path / "tiny").iterdir() if p.is_dir()}
    rows = {arm: {r.name: r.value for r in read_metrics(f.metrics)} for arm, f in runs.items()}
    key = "health/target/negative_transfer"
    assert key not in rows["source-only"]
    assert key not in rows["other"], "a run of another seed is no reference"
    keys = [f"health/target/{score}" for score in ("infomax", "snd", "reverse")]
    worse = [rows["dann"][k] < rows["source-only"][k] for k in keys]
    assert rows["dann"][key] == pytest.approx(sum(worse) / len(worse))
    for name in ("features-start.png", "features-end.png"):
        assert (runs["dann"].figures / name).read_bytes().startswith(b"\x89PNG")
    assert not any(k.startswith("health/") for k in runs["dann"].summary()["metrics"])
