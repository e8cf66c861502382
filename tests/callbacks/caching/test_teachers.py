"""Outputs of teachers (LwF, feature distillation, DELTA) are computed once a sample and view, and change no weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.tiny_models import tiny_text
from callbacks.caching.cached_runs import fit, image_data, text_data, warned
from lightning.pytorch import Callback
from tiny import TinyVision, flat
from torch import Tensor

from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.retention import DELTA, FeatureDistillation, LwF
from crossft.runs import stored_prefixes

VERIFIED = 4 * 3
"""Rows of the first batch that run both ways: in full, in two halves, and beside rows that the student has stored."""
METHODS: dict[str, Callable[[], Any]] = {
    "lwf": lambda: LwF(weight=5.0, rows="all"),
    "features": lambda: FeatureDistillation(weight=3.0, rows="all"),
    "stages": lambda: FeatureDistillation(weight=3.0, stages=["stem", "last"], rows="all"),
    "delta": lambda: DELTA(weight=3.0, stages=["middle"], attention="uniform"),
}


class Counts(Callback):
    """Rows that the teachers' networks have run."""

    def __init__(self, nudge: int | None = None) -> None:
        self.rows, self.nudge = 0, nudge

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.teachers = [term.teacher for term in pl_module.attachments.terms.values()]
        for teacher in self.teachers:
            teacher.backbone.register_forward_hook(self._add)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.nudge:
            with torch.no_grad():
                next(self.teachers[0].backbone.parameters()).add_(0.1)

    def _add(self, module: Any, inputs: Any, output: Any) -> None:
        self.rows += len(output.features)


def run(data: Any, last: int, cache: PrefixCache | None, name: str, *more: Any, **options: Any) -> tuple[Tensor, int]:
    counts = Counts(options.pop("nudge", None))
    task, _ = fit(data, last, cache, *more, methods=[METHODS[name](), counts], **options)
    return flat(task), counts.rows


@pytest.mark.parametrize("name", METHODS)
def test_each_sample_is_seen_once_by_its_teacher(images: Path, name: str) -> None:
    """One stage trains: the first epoch draws each of 30 rows once; a second run has them all."""
    weights, rows = run(image_data(images), 1, None, name)
    assert rows >= 3 * 30
    for expected in (30, 0):
        cached, rows = run(image_data(images), 1, PrefixCache(), name)
        assert (cached - weights).abs().max() < 1e-6
        assert expected <= rows <= expected + VERIFIED + 2  # 2: rows that pad the last step


@pytest.mark.parametrize("last", [0, 3], ids=["probe", "everything"])
def test_whatever_trains(images: Path, last: int) -> None:
    """The teacher of a probe is the frozen network itself, and shares what is stored of it."""
    weights, _ = run(image_data(images), last, None, "features", accumulate_grad_batches=2)
    for expected in (0 if last == 0 else 30, 0):
        cached, rows = run(image_data(images), last, PrefixCache(), "features", accumulate_grad_batches=2)
        assert (cached - weights).abs().max() < 1e-6
        assert expected <= rows <= expected + VERIFIED + 2
    assert [p.stage for p in stored_prefixes()] == ["features"]


def test_texts(texts: Path) -> None:
    data = text_data(texts)
    stages = [s.name for s in tiny_text("bert", texts / "model").stages]
    method = partial(FeatureDistillation, 3.0, stages[1:3], "all")

    def trained(cache: PrefixCache | None) -> tuple[Tensor, int]:
        counts = Counts()
        task, _ = fit(data, 3, cache, partial(tiny_text, "bert", texts / "model"), methods=[method(), counts])
        return flat(task), counts.rows

    weights, _ = trained(None)
    for expected in (30, 0):
        cached, rows = trained(PrefixCache())
        assert (cached - weights).abs().max() < 1e-6
        assert expected <= rows <= expected + VERIFIED + 2


def test_another_start_is_another_teacher(images: Path) -> None:
    def other() -> TinyVision:
        torch.manual_seed(7)
        return TinyVision()

    run(image_data(images), 3, PrefixCache(), "lwf", TinyVision)
    weights, _ = run(image_data(images), 3, None, "lwf", other)
    cached, rows = run(image_data(images), 3, PrefixCache(), "lwf", other)
    assert (cached - weights).abs().max() < 1e-6
    assert rows >= 30
    assert len(stored_prefixes()) == 2


def test_fixed_views_have_an_output_each_and_random_ones_none(images: Path) -> None:
    views = partial(image_data, images, augment="flip", views=2)
    weights, _ = run(views(), 3, None, "features")
    for expected in (60, 0):  # three epochs draw both views of a row
        cached, rows = run(views(), 3, PrefixCache(), "features")
        assert (cached - weights).abs().max() < 1e-6
        assert expected <= rows <= expected + VERIFIED + 4
    stored = stored_prefixes()[0].rows
    weights, plain = run(image_data(images, augment="flip"), 3, None, "features")
    cached, rows = run(image_data(images, augment="flip"), 3, PrefixCache(), "features")
    assert torch.equal(cached, weights)
    assert rows == plain
    assert stored_prefixes()[0].rows == stored


def test_a_teacher_that_changes_is_noticed(images: Path) -> None:
    weights, _ = run(image_data(images), 3, None, "features", nudge=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached, _ = run(image_data(images), 3, PrefixCache(), "features", nudge=5)
    assert (cached - weights).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "a teacher has changed its weights" in message


def test_a_budget_that_is_used_up_changes_no_weight(images: Path) -> None:
    weights, _ = run(image_data(images), 3, None, "features")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached, rows = run(image_data(images), 3, PrefixCache(budget_gb=6e-6), "features")
    assert (cached - weights).abs().max() < 1e-6
    assert rows > 40
    assert any("the budget of 6e-06 GB is used up" in message for message in warned(caught))
