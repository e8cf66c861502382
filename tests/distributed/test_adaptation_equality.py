"""Every method of adaptation gives the same weights on one process and two; means over rows under accumulation too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adaptation_cases import CASES, SWAD_CASE
from tiny import image_domains

HERE = Path(__file__).parent
ALL = {**CASES, "swad": SWAD_CASE}
Results = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("adaptation")
    # 2 x 23 rows a domain: no batch size divides them, so one of the four steps is ragged
    data = image_domains(folder / "data", domains=("photo", "sketch", "art"), each=23)
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    for world in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if world > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(HERE / "adaptation_worker.py"), str(data), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names = ("1-0", "2-0", "2-1")
    return {n: torch.load(folder / f"results-{n}.pt", weights_only=True) for n in names}


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if c.processes])
def test_two_processes_end_where_one_does(results: Results, name: str) -> None:
    one, two = results["1-0"], results["2-0"]
    assert (two[f"{name}/1"] - one[f"{name}/1"]).abs().max() < 2e-6
    assert torch.allclose(two[f"{name}/1/term"], one[f"{name}/1/term"], atol=2e-6)


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if c.rows])
def test_means_over_rows_do_not_depend_on_accumulation(results: Results, name: str) -> None:
    one, two = results["1-0"], results["2-0"]
    assert (one[f"{name}/4"] - one[f"{name}/1"]).abs().max() < 2e-6
    assert (two[f"{name}/2"] - one[f"{name}/1"]).abs().max() < 2e-6


def test_ranks_hold_equal_bits(results: Results) -> None:
    first, second = results["2-0"], results["2-1"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ALL)
def test_the_method_does_change_the_weights(results: Results, name: str) -> None:
    one = results["1-0"]
    assert (one[f"{name}/1"] - one[f"none-{ALL[name].sources}/1"]).abs().max() > 1e-5


def test_scores_and_health_are_those_of_all_rows(results: Results) -> None:
    """From features that differ by rounding, so not to the bit; 2 x 9 rows and a remainder on two processes."""
    one, two = results["1-0"], results["2-0"]
    keys = [k for k in one if k.startswith("scores/")]
    assert len(keys) == 7 + 1 + 2 * 4 + 3 + 3 + 1  # scores, gradient, distances by layer, collapse, votes, gap
    for key in keys:
        assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-4, abs=1e-5), key


def test_tent_steps_on_the_rows_of_all_processes(results: Results) -> None:
    one, two = results["1-0"], results["2-0"]
    assert abs(one["tent"] - one["no tent"]) > 1e-4
    assert torch.allclose(two["tent"], one["tent"], atol=1e-5)


def test_statistics_of_the_target_are_those_of_all_processes(results: Results) -> None:
    """Not to the bit: each process normalizes its own rows in training, and batches of 4, not 8, are averaged. What the
    statistics of given weights are over processes, tests/backbones/test_backbones_distributed.py compares exactly."""
    one, two = results["1-0"]["adabn"], results["2-0"]["adabn"]
    assert one.abs().max() > 0.2
    assert (two - one).abs().max() < 0.02


def test_the_gather_has_the_gradients_of_one_process(results: Results) -> None:
    one, two = results["1-0"], results["2-0"]
    keys = [k for k in one if k.startswith("gather/")]
    assert len(keys) == 6
    assert torch.equal(one["gather/labels"], torch.arange(5))
    for key in keys:
        assert torch.allclose(two[key], one[key], atol=1e-6), key
