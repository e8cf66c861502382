"""Inputs that nobody is expected to read are loaded when somebody does; fixed views come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyVision, image_domains

from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.types import Batch, LateInputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("late") / "data", each=8)


def data_of(root: Path, **options: Any) -> DomainData:
    data = DomainData(root, target="photo", batch_size=4, **options)
    data.prepare()
    data.bind(TinyVision().input_spec)
    return data


def epochs(data: DomainData, count: int) -> list[dict[int, torch.Tensor]]:
    loader = data.train_dataloader()
    return [
        {int(i): x for b in loader for i, x in zip(b.sample_ids, b.inputs["pixel_values"], strict=True)}
        for _ in range(count)
    ]


def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return all(torch.equal(a[i], b[i]) for i in a.keys() & b.keys())


def test_views_come_in_turn() -> None:
    with pytest.raises(ConfigError, match=r"data.views=0 must be at least 1"):
        DomainData("x", target="photo", views=0)


def test_fixed_views_repeat_and_differ(root: Path) -> None:
    first, second, third, fourth = epochs(data_of(root, augment="flip", views=2), 4)
    assert equal(first, third)
    assert equal(second, fourth)
    assert not equal(first, second)
    free = epochs(data_of(root, augment="flip"), 3)
    assert equal(free[0], first)  # the first n draws are those without views
    assert not equal(free[0], free[2])


def test_which_inputs_are_fixed(root: Path) -> None:
    def views(**options: Any) -> list[int | None]:
        data = data_of(root, **options)
        keys = [k for _ in range(3) for batch in data.train_dataloader() for k in batch.keys]
        return sorted({data.dataset.view_of(k) for k in keys}, key=str)

    assert views(augment="none") == [0]
    assert views(augment="none", views=3) == [0]
    assert views(augment="flip") == [None]
    assert views(augment="flip", views=2) == [1]
    data = data_of(root, augment="flip", views=2)
    (loader,) = data.val_dataloader()
    assert {data.dataset.view_of(k) for batch in loader for k in batch.keys} == {0}


@pytest.mark.parametrize("workers", [0, 1])
def test_postponed_inputs_are_loaded_when_read(root: Path, workers: int) -> None:
    plain = {tuple(b.sample_ids.tolist()): b for b in data_of(root, augment="none").train_dataloader()}
    data = data_of(root, augment="none", num_workers=workers)
    rows = data.dataset
    rows.postponed = torch.zeros(1, len(rows), dtype=torch.uint8).share_memory_()
    rows.postponed[0, : 3 * len(rows) // 4] = 1
    late = 0
    for batch in data.train_dataloader():
        known = plain[tuple(batch.sample_ids.tolist())]
        share = sum(int(rows.postponed[0, k.row]) for k in batch.keys) / len(batch)
        assert isinstance(batch.inputs, LateInputs) == (share > 0.5)
        late += share > 0.5
        if share > 0.5:
            taken = batch.inputs.take([1, 0])["pixel_values"]
            assert not batch.inputs.loaded
            assert torch.equal(taken, known.inputs["pixel_values"][[1, 0]])
        assert torch.equal(batch.inputs["pixel_values"], known.inputs["pixel_values"])
        assert list(batch.inputs) == ["pixel_values"]
        assert torch.equal(batch.targets, known.targets)
    assert late


def test_late_inputs_stay_late_on_their_way() -> None:
    asked: list[list[int]] = []

    def load(positions: Any) -> dict[str, torch.Tensor]:
        asked.append(list(positions))
        return {"x": torch.tensor([float(p) for p in positions])}

    ids = torch.arange(3)
    batch = Batch(LateInputs(load, 3), ids, ids > 0, ids, ids, keys=("a", "b", "c"))
    moved = batch.to("meta")
    assert moved.keys == ("a", "b", "c")
    assert isinstance(moved.inputs, LateInputs)
    assert not asked
    assert moved.inputs["x"].device.type == "meta"
    assert moved.inputs.take([2])["x"].shape == (1,)
    assert asked == [[0, 1, 2]]  # once
    assert len(batch.inputs) == 1
    assert batch.inputs.take([2, 0])["x"].tolist() == [2.0, 0.0]
    assert asked == [[0, 1, 2], [0, 1, 2]]  # the first batch is another
