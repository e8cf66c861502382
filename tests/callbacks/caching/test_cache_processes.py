"""The cache under several processes: DDP ranks, runs at one time, and runs that are killed while they write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.caching.cached_runs import fit, image_data
from callbacks.caching.worker import CASES
from tiny import flat, image_domains

from crossft.callbacks.caching import PrefixCache

HERE = Path(__file__).parent
TESTS = HERE.parent.parent


def start(cache: Path, *args: str, world: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [*launcher, str(HERE / "worker.py"), *args],
        env={**os.environ, "PYTHONPATH": path, "CROSSFT_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    image_domains(folder / "data", each=11)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Two runs at the same time, of one process and of two, that fill one cache."""
    running = [start(folder / "cache", "equality", str(folder / "data"), str(folder), world=w) for w in (1, 2)]
    for process in running:
        done(process)
    names = ("1-0", "2-0", "2-1")
    return {name: torch.load(folder / f"cache-{name}.pt", weights_only=True) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_on_every_grid(results: dict[str, dict[str, Any]], case: str) -> None:
    reference = results["1-0"][f"{case}/plain"]
    for name, own in results.items():
        for kind in ("plain", "cold", "warm"):
            assert (own[f"{case}/{kind}"] - reference).abs().max() < 1e-6, (name, kind)
            metrics = own[f"{case}/{kind}/metrics"]
            assert metrics == pytest.approx(results["1-0"][f"{case}/plain/metrics"], abs=1e-5), (name, kind)
        assert own[f"{case}/warm/counts"][1] == 0
        assert own[f"{case}/warm/counts"][0] > 0


def test_ranks_hold_equal_bits(results: dict[str, dict[str, Any]]) -> None:
    first, second = results["2-0"], results["2-1"]
    for case in CASES:
        for kind in ("plain", "cold", "warm"):
            assert torch.equal(first[f"{case}/{kind}"], second[f"{case}/{kind}"])


def test_ranks_share_what_they_keep_in_memory(results: dict[str, dict[str, Any]]) -> None:
    """Each row is computed by one rank, in one epoch."""
    plain = results["1-0"]["last-1/1/plain"]
    misses = 0
    for name in ("2-0", "2-1"):
        assert (results[name]["last-1/1/memory"] - plain).abs().max() < 1e-6
        misses += int(results[name]["last-1/1/memory/counts"][1])
    assert 44 <= misses <= 44 + 4  # every row of both domains; padding rows are not stored


def test_killed_while_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a value (write 15) and within a checksum (write 24); the next run has the whole rows and no other."""
    done(start(folder, "killed", str(folder / "data"), str(folder / "killed"), "15", "24"))
    plain = flat(fit(image_data(folder / "data"), 1, None)[0])
    for write in (15, 24):
        monkeypatch.setenv("CROSSFT_CACHE", str(folder / "killed" / str(write)))
        again = PrefixCache()
        task, _ = fit(image_data(folder / "data"), 1, again)
        assert (flat(task) - plain).abs().max() < 1e-6
        whole = (write - 1) // 2  # rows written before, each a value and a checksum
        assert again.misses == 34 - whole  # 30 rows train, 4 validate
