"""Equal weights with and without the cache: family x {probe, last 2, phases} x processes x accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones.tiny_models import text_folder
from callbacks.caching.families_worker import TEXT, cells
from tiny import image_domains, text_domains

HERE = Path(__file__).parent
TESTS = HERE.parent.parent


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["pairs", "every-cell"])
def test_every_family_trains_to_the_same_weights(tmp_path: Path, every: bool) -> None:
    """One process and two run beside each other on one cache."""
    image_domains(tmp_path / "images", each=11)
    text_domains(tmp_path / "data", each=11)
    for kind in TEXT:
        text_folder(kind, tmp_path / kind)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "CROSSFT_CACHE": str(tmp_path / "cache"),
    }
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = [
        subprocess.Popen(
            [sys.executable, *launcher, str(HERE / "families_worker.py"), str(tmp_path), "every" if every else "pairs"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for launcher in ([], two)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate(timeout=3000 if every else 580)
        assert process.returncode == 0, output[-4000:]
    results = {name: torch.load(tmp_path / f"families-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}
    for cell in ("/".join(map(str, c)) for c in cells(every)):
        for name, found in results.items():
            assert found[cell]["hits"] > 0, (cell, name)
            assert found[cell]["off"] < 1e-6, (cell, name, found[cell]["off"])
        assert torch.equal(results["2-0"][cell]["weights"], results["2-1"][cell]["weights"]), cell
