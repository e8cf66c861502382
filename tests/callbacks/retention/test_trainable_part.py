"""Importance is measured over what may train in a run, from stored prefixes where there are any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.tiny_models import tiny_text
from callbacks.caching.cached_runs import fit, image_data, text_data
from lightning.pytorch import Callback
from tiny import TinyVision, image_domains, text_domains

from crossft.callbacks.averaging import EMA
from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import Freeze, GradualUnfreezing
from crossft.callbacks.freezing.phases import Phase
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints
from crossft.callbacks.retention import EWC, MAS, OnlineEWC
from crossft.callbacks.retention.importance import Importance, Measure
from crossft.data import dataset
from crossft.errors import CheckpointError, TrainingError
from crossft.runs import RunFolder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_domains(tmp_path / "images", each=8)


class Measured(Callback):
    """Measures after all methods have been set up, and counts the rows that the first stage runs meanwhile."""

    def __init__(self, measure: Measure) -> None:
        self.measure, self.rows = measure, 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        first = pl_module.backbone.stages[0].modules[0]
        hook = first.register_forward_hook(self._count)
        self.found = self.measure.run(pl_module, trainer.datamodule)
        hook.remove()

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        self.rows += len(output)


def measured(data: Any, freeze: Callback | None, cache: PrefixCache | None, measure: Measure, *more: Any) -> Measured:
    own = Measured(measure)
    fit(data, None, cache, *more, methods=[*([freeze] if freeze else []), own], max_epochs=2)
    return own


@pytest.mark.parametrize("measure", [Measure(chunk=6), Measure("mas", chunk=6), Measure(labels="sampled", chunk=6)])
@pytest.mark.parametrize("kind", ["images", "text"])
def test_stored_prefixes_give_the_same_importance_and_the_prefix_does_not_run(
    images: Path, tmp_path: Path, kind: str, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full pass of a run that trains everything is the reference."""
    backbone: Callable[[], Any] = TinyVision
    if kind == "text":
        folder = tmp_path / "text"
        text_domains(folder / "data", each=11)
        backbone = partial(tiny_text, "bert", folder / "model")
        data: Any = text_data(folder)
    else:
        data = image_data(images)
    whole = measured(data, None, None, measure, backbone).found
    part = measured(data, Freeze(train_last=1), None, measure, backbone)
    first = measured(data, Freeze(train_last=1), PrefixCache(), measure, backbone)
    again = measured(data, Freeze(train_last=1), PrefixCache(), measure, backbone)
    names = set(part.found.values)
    assert names
    assert names < set(whole.values)
    assert set(part.found.provenance["left_out"]) == set(whole.values) - names
    for run in (part, first, again):
        assert set(run.found.values) == names
        for name in names:
            scale = float(whole.values[name].max())
            assert torch.allclose(run.found.values[name], whole.values[name], rtol=1e-4, atol=1e-5 * scale), name
    rows = part.found.provenance["rows"]
    opened: list[Any] = []
    original = dataset.open_image
    monkeypatch.setattr(dataset, "open_image", lambda source: opened.append(source) or original(source))
    if kind == "images":
        measured(image_data(images, cache_images=False), Freeze(train_last=1), PrefixCache(), measure, backbone)
        assert len(opened) < rows, "what is stored is decoded only to be verified"
    assert part.rows >= rows
    assert again.rows <= 8 < rows, "two rows both ways, for verification"


def test_a_linear_probe_holds_nothing_and_reads_nothing(images: Path) -> None:
    ewc = EWC()
    with pytest.warns(UserWarning, match=r"methods\.ewc holds the backbone, of which nothing trains"):
        task, _ = fit(image_data(images), None, None, TinyVision, methods=[ewc, Freeze(train_last=0)], max_epochs=1)
    penalty: Any = task.attachments.penalties["ewc"]
    assert penalty.provenance["rows"] == 0
    assert float(penalty.value()) == 0.0


@pytest.mark.parametrize("method", [EWC, OnlineEWC, MAS])
def test_a_probe_in_a_chain_hands_on_what_was_measured_before_it(images: Path, tmp_path: Path, method: Any) -> None:
    data = image_data(images)
    leg(data, tmp_path / "a", None, Freeze(train_last=0), method())
    leg(data, tmp_path / "b", tmp_path / "a", method())
    found = Importance.load(tmp_path / "b" / "anchors" / f"{method.__name__.lower()}.safetensors")
    assert found.provenance["rows"] > 0
    assert "left_out" not in found.provenance
    leg(data, tmp_path / "c", tmp_path / "b", Freeze(train_last=0), method())
    kept = Importance.load(tmp_path / "c" / "anchors" / f"{method.__name__.lower()}.safetensors")
    assert kept.provenance["domains"] == ["photo"]
    assert all(torch.equal(kept.values[n], found.values[n]) for n in found.values)


def phases() -> GradualUnfreezing:
    return GradualUnfreezing(phases=[Phase(train_last=1, epochs=1), Phase(train_last=2)])


def test_what_a_later_phase_trains_is_measured_before(images: Path) -> None:
    data = image_data(images)
    whole = measured(data, None, None, Measure(), TinyVision).found.values
    found = measured(data, phases(), None, Measure(), TinyVision)
    assert set(found.found.values) == {n for n in whole if not n.startswith("stem.")}
    assert torch.allclose(found.found.values["middle.0.weight"], whole["middle.0.weight"], rtol=1e-4)
    task, _ = fit(data, None, PrefixCache(), TinyVision, methods=[EWC(), phases()])
    assert float(task.attachments.penalties["ewc"].importance_of("middle.0.weight").max()) > 0
    assert task.thawing == frozenset(), "no phase comes after the fit"


def leg(data: Any, folder: Path, parent: Path | None, *methods: Callback) -> None:
    RunFolder(folder).path.mkdir(parents=True)
    RunFolder(folder).write_summary(status="running", parent=None if parent is None else str(parent))
    kept = {"max_epochs": 1, "plugins": [AtomicCheckpointIO()]}
    fit(data, None, None, TinyVision, methods=[*methods, Checkpoints(folder)], **kept)


def test_importance_of_a_part_is_refused_where_more_trains(images: Path, tmp_path: Path) -> None:
    data = image_data(images)
    leg(data, tmp_path / "a", None, MAS(), Freeze(train_last=1))
    stored = Importance.load(tmp_path / "a" / "anchors" / "mas.safetensors")
    assert "stem.1.weight" in stored.provenance["left_out"]
    leg(data, tmp_path / "b", tmp_path / "a", MAS(), Freeze(train_last=1))
    with pytest.raises(CheckpointError, match=r"says nothing of stem\.1\.weight: it was measured where that never"):
        leg(data, tmp_path / "c", tmp_path / "a", MAS())
    leg(data, tmp_path / "d", None, MAS(), EMA())
    leg(data, tmp_path / "e", tmp_path / "d", MAS(), Freeze(train_last=1))


def test_what_thaws_against_what_was_said_ends_the_fit(images: Path) -> None:
    with pytest.raises(TrainingError, match=r"middle\.0\.weight trains, and its importance was not measured"):
        fit(image_data(images), {0: 1, 2: 2}, None, TinyVision, methods=[EWC()], max_epochs=1)
