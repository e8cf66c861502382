"""Phases on two processes: ranks bit-equal after every step, and equal to one process; the naive way is caught."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import image_domains

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("phases")
    data = image_domains(folder / "data", each=25)  # 35 training rows a domain: the fifth step of an epoch is ragged
    started = []
    for world in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if world == 2 else []
        path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
        command = [sys.executable, *launcher, str(HERE / "phase_worker.py"), str(data), str(folder)]
        started.append(
            subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500)
        )
    for done in started:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names = {"one": "phases-1-0.pt", "first": "phases-2-0.pt", "second": "phases-2-1.pt"}
    return {k: torch.load(folder / v, weights_only=True) for k, v in names.items()}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_ranks_are_bit_equal_after_every_step_of_every_phase(results, accumulation: int) -> None:
    first, second = (results[k][f"weights/{accumulation}"] for k in ("first", "second"))
    assert len(first) == len(second) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_two_processes_equal_one(results, accumulation: int) -> None:
    reference = results["one"]["weights/1"]
    assert (reference[0] - reference[-1]).abs().max() > 1e-2
    for name in ("one", "first"):
        for step, (mine, expected) in enumerate(zip(results[name][f"weights/{accumulation}"], reference, strict=True)):
            assert (mine - expected).abs().max() < 1e-6, (name, step)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trainable_is_reduced_is_has_a_gradient_in_every_phase(results, accumulation: int) -> None:
    expected = [(), ("last.",), ("middle.", "bias"), ("stem.", "middle.", "last.")]
    for name in ("one", "first", "second"):
        facts = results[name][f"facts/{accumulation}"]
        assert len(facts) == 8
        for step, fact in enumerate(facts):
            assert fact["trains"] == fact["graded"], (name, step)
            assert fact["reduced"] == len(fact["trains"]), (name, step)
            backbone = {n.removeprefix("backbone.") for n in fact["trains"] if n.startswith("backbone.")}
            for part in expected[step // 2]:
                assert any(part in n for n in backbone), (name, step, part)
            if step < 2:
                assert not backbone


@pytest.mark.parametrize("accumulation", [1, 4])
def test_sharded_phases_equal_one_process(results, accumulation: int) -> None:
    """FSDP2: after every step of every phase; what trains has gradients, what is frozen has none."""
    reference = results["one"]["weights/1"]
    first, second = (results[k][f"sharded/{accumulation}"] for k in ("first", "second"))
    assert len(first) == len(second) == 8
    for step, (a, b, expected) in enumerate(zip(first, second, reference, strict=True)):
        assert torch.equal(a, b), step
        assert (a - expected).abs().max() < 1e-5, step
    for name in ("first", "second"):
        for step, fact in enumerate(results[name][f"sharded/facts/{accumulation}"]):
            assert fact["trains"] == fact["graded"] == results["one"]["facts/1"][step]["trains"], (name, step)


@pytest.mark.parametrize(
    ("strategy", "tolerance"), [("adapters", 1e-6), ("sharded/adapters", 1e-5)], ids=["ddp", "fsdp2"]
)
def test_phases_over_adapters_are_equal_on_all_processes_and_to_one(results, strategy: str, tolerance: float) -> None:
    """The head alone, then the adapters, then everything; what trains has a gradient in each."""
    reference, facts = results["one"]["adapters"], results["one"]["adapters/facts"]
    first, second = (results[k][strategy] for k in ("first", "second"))
    assert len(first) == len(second) == 8
    for step, (a, b, expected) in enumerate(zip(first, second, reference, strict=True)):
        assert torch.equal(a, b), step
        assert (a - expected).abs().max() < tolerance, step
    assert [any("lora_" in n for n in fact["trains"]) for fact in facts] == [False] * 2 + [True] * 6
    assert [any("base_layer" in n for n in fact["trains"]) for fact in facts] == [False] * 5 + [True] * 3
    for name in ("first", "second"):
        for step, fact in enumerate(results[name][f"{strategy}/facts"]):
            assert fact["trains"] == fact["graded"] == facts[step]["graded"], (name, step)
            assert fact["reduced"] == len(fact["trains"]), (name, step)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_sharded_image_backbones_have_the_gradients_of_whole_ones(results, name: str) -> None:
    check_gradients(results, name)


@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
def test_sharded_text_backbones_have_the_gradients_of_whole_ones(results, name: str) -> None:
    check_gradients(results, name)


def check_gradients(results: dict[str, dict[str, Any]], name: str) -> None:
    """Of position embeddings and class tokens too, which the backbone itself holds."""
    for rank in ("first", "second"):
        errors = results[rank]["gradients"][name]
        assert len(errors) > 10
        assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def test_the_sentinel_catches_the_naive_way_on_every_process(results) -> None:
    """TRAP 1: what thaws after DDP has wrapped is never all-reduced; nothing else notices."""
    assert results["one"]["naive"] == ""
    for name in ("first", "second"):
        message = results[name]["naive"]
        assert "different weights at optimizer step 3" in message
        assert "'backbone." in message
