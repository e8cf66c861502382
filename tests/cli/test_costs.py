"""What a step costs, against counts by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossft.backbones import Backbone
from crossft.backbones.base import StagePlan
from crossft.cli import cost
from crossft.cli.cost import seconds_of
from crossft.cli.costs import full_cost, step_cost
from crossft.cli.legs import prepared
from crossft.cli.parser import Settings
from crossft.tasks import Classification
from crossft.types import Domain, Encoded, ImageSpec

SIZE, IN, OUT, GROUPS = 8, 3, 12, 3


class Grouped(Backbone):
    """A 3 x 3 convolution, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(IN, OUT, 3, padding=1), nn.Conv2d(OUT, OUT, 3, padding=1, groups=GROUPS)
        self.num_features, self.pretrained = OUT, True
        self.input_spec = ImageSpec((SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
        self._plans = (StagePlan("first", ("first",)), StagePlan("second", ("second",)))

    def _encode(self, start: int, value: Tensor | None, inputs: Any, capture: Any) -> Encoded:
        return Encoded(features=self.second(self.first(inputs["pixel_values"])).mean((2, 3)))

    def _reason(self, index: int) -> str | None:
        return None

    def export(self, folder: Path) -> Path:
        raise AssertionError("never exported")


def test_a_grouped_convolution_costs_its_groups() -> None:
    labels = ("a", "b")
    task = Classification(Grouped(), [Domain("one", "source", labels=labels), Domain("two", "target", labels=labels)])
    first = 2 * SIZE * SIZE * OUT * IN * 9
    second = 2 * SIZE * SIZE * OUT * (OUT // GROUPS) * 9
    head = 2 * OUT * len(labels)
    whole = (first + second + head, first + 2 * second + 2 * head)  # the image itself needs no gradient
    assert step_cost(task) == full_cost(task) == whole
    task.backbone.first.requires_grad_(False)
    assert step_cost(task) == (whole[0], second + 2 * head)
    assert full_cost(task) == whole
    assert not any(p.requires_grad for p in task.backbone.first.parameters())
    task.backbone.requires_grad_(False)
    assert step_cost(task) == (whole[0], head)
    assert all(torch.isfinite(p).all() and p.grad is None for p in task.parameters())


def test_a_run_with_phases_is_timed_from_its_first_steps(config: Path, images: Path) -> None:
    """Those end long before its last phase, and without validation."""
    unfreeze = "{class_path: crossft.callbacks.freezing.GradualUnfreezing, init_args: {every: {patience: 1}, by: 9, "
    named = [f"--data.root={images}", "--data.source=photo", "--data.target=sketch", "--methods.freeze=null"]
    arm = f"--methods.unfreeze={unfreeze}monitor: target/val/loss}}}}"
    settings = Settings([f"--config={config}", *named, arm, "--trainer.max_epochs=9"])
    assert seconds_of(settings, prepared(settings), False) > 0


def test_every_validation_counts(config: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps with a validation each, and one before the first: seven; against two of one after all steps."""
    monkeypatch.setattr(cost, "measure", lambda *_: time.sleep(1.0))
    named = [f"--config={config}", f"--data.root={images}", "--data.source=photo", "--data.target=sketch"]
    named += ["--source_leg=null", "--trainer.max_epochs=-1", "--trainer.max_steps=6"]
    named += ["--trainer.check_val_every_n_epoch=null"]
    found = {}
    for every in (1, 6):
        settings = Settings([*named, f"--trainer.val_check_interval={every}"])
        found[every] = seconds_of(settings, prepared(settings), False)
    assert found[1] - found[6] == pytest.approx(5 * 1.0, abs=2.5)
