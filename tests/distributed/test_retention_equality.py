"""Retention and averaging give the weights of one process on two, and under accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from retention_cases import CASES, images

HERE = Path(__file__).parent


def run(world: int, *args: str) -> None:
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    done = subprocess.run(
        [*launcher, str(HERE / "retention_worker.py"), *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("retention")
    root = images(folder / "data")
    for world in (1, 2):
        run(world, str(root), str(folder))
    names = {"one": "1-0", "two": "2-0", "other": "2-1"}
    return {k: torch.load(folder / f"retention-{v}.pt", weights_only=True) for k, v in names.items()}


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.rows])
def test_accumulation_does_not_change_the_weights(results, name: str) -> None:
    near(results["one"][f"{name}/2"], results["one"][f"{name}/1"])


@pytest.mark.parametrize("name", [*(n for n, c in CASES.items() if not c.batchnorm), "recadam"])
def test_two_processes_end_at_the_weights_of_one(results, name: str) -> None:
    near(results["two"][f"{name}/1"], results["one"][f"{name}/1"])


def test_importance_memories_and_paths_are_those_of_one_process(results) -> None:
    names = [k for k in results["one"] if k.endswith("/state") or k.startswith(("importance/", "rows/"))]
    assert len(names) >= 14
    for name in names:
        near(results["two"][name].double(), results["one"][name].double())
    assert results["one"]["rows/exact"] == results["one"]["rows/chunks"] > 17 == results["one"]["rows/some"]
    near(results["one"]["importance/chunks"], results["one"]["importance/exact"])


def test_ranks_hold_equal_bits(results) -> None:
    assert results["two"].keys() == results["other"].keys()
    assert all(torch.equal(results["two"][k], results["other"][k]) for k in results["two"])
