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


def test_two_runs_of_one_and_two_processes_on_one_cache(folder: Path) -> None:
    """Both fill it at the same time. One test, so that the processes start once."""
    running = [start(folder / "cache", "equality", str(folder / "data"), str(folder), world=w) for w in (1, 2)]
    for process in running:
        done(process)
    results = {name: torch.load(folder / f"cache-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}
    for case in CASES:
        check_grids(results, case)
    check_memory(results)


def check_grids(results: dict[str, dict[str, Any]], case: str) -> None:
    """Without a cache, with an empty one and with a full one: equal on every grid, to the bit between ranks."""
    reference, metrics = results["1-0"][f"{case}/plain"], results["1-0"][f"{case}/plain/metrics"]
    for name, own in results.items():
        for kind in ("plain", "cold", "warm"):
            assert (own[f"{case}/{kind}"] - reference).abs().max() < 1e-6, (case, name, kind)
            assert own[f"{case}/{kind}/metrics"] == pytest.approx(metrics, abs=1e-5), (case, name, kind)
            if name == "2-1":
                assert torch.equal(own[f"{case}/{kind}"], results["2-0"][f"{case}/{kind}"]), (case, kind)
        hits, misses = own[f"{case}/warm/counts"].tolist()
        assert hits > 0
        assert misses == 0


def check_memory(results: dict[str, dict[str, Any]]) -> None:
    """Ranks share what they keep in memory: each row is computed by one of them, in one epoch."""
    misses = 0
    for name in ("2-0", "2-1"):
        assert (results[name]["last-1/1/memory"] - results["1-0"]["last-1/1/plain"]).abs().max() < 1e-6
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
