"""The same step on 1x1, 1x4, 2x1 and 2x2 (processes x accumulation) gives equal weights and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import image_domains

HERE = Path(__file__).parent
CASES = ["none", "l2sp", "dann", "both", "ragged"]


def run(world: int, *args: str) -> None:
    """Run the worker in ``world`` processes, under torchrun where there are two."""
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    done = subprocess.run(
        [*launcher, str(HERE / "worker.py"), *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    # 2 x 23 rows a domain: no batch size divides them, so the last step is ragged on every grid
    data = image_domains(folder / "data", each=23)
    for world in (1, 2):
        run(world, str(data), str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_do_not_depend_on_the_grid(results: Path, case: str) -> None:
    one = torch.load(results / "results-1-0.pt", weights_only=True)
    two = torch.load(results / "results-2-0.pt", weights_only=True)
    reference = one[f"{case}/1"]
    for name, other in (("1x4", one[f"{case}/4"]), ("2x1", two[f"{case}/1"]), ("2x2", two[f"{case}/2"])):
        assert (other - reference).abs().max() < 1e-6, name


def test_ranks_hold_equal_bits(results: Path) -> None:
    first, second = (torch.load(results / f"results-2-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_methods_do_change_the_weights(results: Path) -> None:
    """The equality above would hold for methods that do nothing; they do something."""
    one = torch.load(results / "results-1-0.pt", weights_only=True)
    weights = [one[f"{case}/1"] for case in ("none", "l2sp", "dann", "both")]
    for i, a in enumerate(weights):
        for b in weights[i + 1 :]:
            assert (a - b).abs().max() > 1e-4


def test_metrics_do_not_depend_on_the_grid(results: Path) -> None:
    one = json.loads((results / "metrics-1-0.json").read_text())
    two = json.loads((results / "metrics-2-0.json").read_text())
    reference = one["ragged/1"]
    assert {"source/test/accuracy", "target/test/auroc", "target/test/loss"} <= set(reference)
    assert sum(key.startswith("bins/") for key in reference) == 2 * 3 * 15  # domains, [rows, confidence, outcome], bins
    for other in (one["ragged/4"], two["ragged/1"], two["ragged/2"]):
        assert other == pytest.approx(reference, abs=1e-5)


def test_all_processes_stop_together_where_one_diverges(results: Path) -> None:
    for name in ("1-0", "2-0", "2-1"):
        said = (results / f"diverged-{name}.txt").read_text()
        assert "training diverged" in said, name
        assert "now at step 2" in said, name
