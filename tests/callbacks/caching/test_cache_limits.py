"""Stored values are found by content alone, and whatever goes wrong with them changes no result."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones.tiny_models import tiny_text
from callbacks.caching.cached_runs import fit, image_data, metrics, text_data, warned
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from tiny import TinyVision, flat

from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.caching.fingerprint import prefix_key
from crossft.errors import ConfigError
from crossft.runs import stored_prefixes
from crossft.tasks import Classification


def test_the_key_changes_with_whatever_changes_the_value() -> None:
    def backbone(seed: int = 0) -> TinyVision:
        torch.manual_seed(seed)
        return TinyVision(batchnorm=True).eval()

    def key(net: TinyVision, *more: object) -> str:
        return prefix_key(net, net.stages[:2], torch.device("cpu"), *more)

    first = key(backbone())
    assert key(backbone()) == first
    others = [key(backbone(1)), key(backbone(), "bfloat16")]
    for change in ("weight", "buffer", "mode", "setting", "last"):
        net = backbone()
        norm: Any = net.middle[1]
        if change == "weight":
            net.stem[1].weight.data[0, 0] += 1e-6
        elif change == "buffer":
            norm.running_mean[0] += 1e-6
        elif change == "mode":
            norm.train()
        elif change == "setting":
            norm.eps *= 2
        else:
            net.last[0].weight.data.zero_()  # above the cut: the same prefix
            assert key(net) == first
            continue
        others.append(key(net))
    with torch.autocast("cpu", torch.bfloat16):
        others.append(key(backbone()))
    assert len({first, *others}) == len(others) + 1


def test_the_rows_key_changes_with_samples_transform_and_tokens(images: Path, texts: Path) -> None:
    def image(view: int = 0, **options: Any) -> str:
        data = image_data(images, **options)
        data.bind(TinyVision().input_spec)
        return data.dataset.content(slice(0, 20), view)

    assert image() == image(target="sketch", augment="flip", views=2)
    others = [image(image_size=4), image(1, augment="flip", views=2), image(1, augment="light", views=2)]
    others += [image(2, augment="flip", views=2), image(1, augment="flip", views=2, seed=1)]
    assert len({image(), *others}) == 6

    def text(**options: Any) -> str:
        data = text_data(texts, **options)
        data.bind(tiny_text("bert", texts / "model").input_spec)
        return data.dataset.content(slice(0, 20), 0)

    assert text() == text()
    assert len({text(), text(max_length=4), text(source="kitchen", target="books")}) == 3


def test_a_changed_image_is_computed_again(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(images, root)
    fit(image_data(root), 1, PrefixCache())
    changed = next((root / "photo" / "cat").iterdir())
    Image.new("RGB", (8, 8), (1, 2, 3)).save(changed)
    plain = flat(fit(image_data(root), 1, None)[0])
    cache = PrefixCache()
    assert (flat(fit(image_data(root), 1, cache)[0]) - plain).abs().max() < 1e-6
    assert cache.misses > 0


class Nudge(Callback):
    """Moves a frozen weight in the middle of training, and swaps weights for each validation, as averaging does."""

    def __init__(self, step: int | None = None, swap: bool = False) -> None:
        self.step, self.swap = step, swap

    def _move(self, task: Any, by: float) -> None:
        with torch.no_grad():
            task.backbone.stem[1].weight.add_(by)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self._move(pl_module, 0.05)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.swap:
            self._move(pl_module, 0.25)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.swap:
            self._move(pl_module, -0.25)


@pytest.mark.parametrize("nudge", [{"step": 8}, {"swap": True}], ids=["moved", "swapped"])
def test_weights_that_change_under_it_are_noticed(images: Path, nudge: dict[str, Any]) -> None:
    def backbone() -> TinyVision:
        net = TinyVision()
        with torch.no_grad():  # to multiples of 1/64, and no -0, so that a swap is undone to the bit
            net.stem[1].weight.mul_(64).round_().div_(64).add_(0.0)
        return net

    runs = []
    for cache in (None, PrefixCache()):
        task, trainer = fit(image_data(images), 1, cache, backbone, methods=[Nudge(**nudge)])
        runs.append((flat(task), metrics(trainer)))
    assert (runs[0][0] - runs[1][0]).abs().max() < 1e-6
    assert runs[1][1] == pytest.approx(runs[0][1], abs=1e-5)
    assert len(stored_prefixes()) == (2 if "step" in nudge else 1)


# When it cannot


class BatchCentered(TinyVision):
    """A prefix whose value depends on the rows beside it."""

    def _encode(self, start: int, value: Any, inputs: Any, capture: Any) -> Any:
        if start == 0:
            pixels = inputs["pixel_values"]
            inputs = {"pixel_values": pixels - pixels.mean(0, keepdim=True)}
        return super()._encode(start, value, inputs, capture)


def test_a_prefix_that_cannot_be_cached_falls_back_with_one_warning(images: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, _ = fit(image_data(images), 1, PrefixCache(), BatchCentered)
    assert (flat(task) - flat(fit(image_data(images), 1, None, BatchCentered)[0])).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "the cached path differs from the full one by" in message
    assert "allowed 0.0001" in message


class RandomPooling(TinyVision):
    """Dropout behind the last stage, by the mode of the backbone, as timm's drop_rate does."""

    def _encode(self, start: int, value: Any, inputs: Any, capture: Any) -> Any:
        encoded = super()._encode(start, value, inputs, capture)
        encoded.features = torch.dropout(encoded.features, 0.5, self.training)
        return encoded


def test_a_probe_with_dropout_behind_the_last_stage_is_cached_before_it(images: Path) -> None:
    task, _ = fit(image_data(images), 0, PrefixCache(), RandomPooling)
    assert (flat(task) - flat(fit(image_data(images), 0, None, RandomPooling)[0])).abs().max() < 1e-6
    assert {p.stage for p in stored_prefixes() if p.rows} == {"last"}


def test_stored_values_that_are_wrong_are_found_by_the_first_batch(images: Path, store: Path) -> None:
    """A whole, well-formed store of another prefix under this one's key."""

    def other() -> TinyVision:
        torch.manual_seed(5)
        return TinyVision(dropout=0.2)

    plain = flat(fit(image_data(images), 1, None)[0])
    fit(image_data(images), 1, PrefixCache())
    (mine,) = [p.key for p in stored_prefixes()]
    fit(image_data(images), 1, PrefixCache(), other)
    (wrong,) = [p.key for p in stored_prefixes() if p.key != mine]
    shutil.rmtree(store / mine)
    (store / wrong).rename(store / mine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, _ = fit(image_data(images), 1, PrefixCache())
    assert (flat(task) - plain).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "the cached path differs from the full one by" in message


def test_the_budget_is_kept_and_said(images: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, _ = fit(image_data(images), 1, PrefixCache(budget_gb=6e-6))
    assert (flat(task) - flat(fit(image_data(images), 1, None)[0])).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "the budget of 6e-06 GB is used up" in message
    assert "crossft cache rm" in message
    (prefix,) = stored_prefixes()
    assert 0 < prefix.rows < 40
    with pytest.raises(ConfigError, match="budget_gb=0 must be above 0"):
        PrefixCache(budget_gb=0)


def test_a_full_disk_stops_the_storing_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, original = [0], os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        written[0] += 1
        if written[0] > 21:
            raise OSError(28, "No space left on device")
        return original(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, _ = fit(image_data(images), 1, PrefixCache())
    assert (flat(task) - flat(fit(image_data(images), 1, None)[0])).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "No space left on device" in message
    assert stored_prefixes()[0].rows == 10


def test_a_folder_that_cannot_be_used(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    data = image_data(images)
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, _ = fit(data, 1, PrefixCache())
    assert (flat(task) - flat(fit(data, 1, None)[0])).abs().max() < 1e-6
    (message,) = warned(caught)
    assert "Not a directory" in message


def test_in_memory_nothing_is_left(images: Path, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PrefixCache(where="memory")
    with caplog.at_level(logging.INFO):
        task, trainer = fit(image_data(images), 1, cache)
    assert (flat(task) - flat(fit(image_data(images), 1, None)[0])).abs().max() < 1e-6
    assert cache.hits > 0
    folder = cache._budget.root
    assert folder.is_dir()
    assert not store.exists()
    del cache, task, trainer
    gc.collect()
    assert not folder.exists()


def test_bfloat16_takes_half_the_room_and_stays_near(images: Path) -> None:
    plain = flat(fit(image_data(images), 1, None)[0])
    sizes = []
    for dtype in ("float32", "bfloat16"):
        task, _ = fit(image_data(images), 1, PrefixCache(dtype=dtype))
        near = (flat(task) - plain).abs().max()
        assert near < (1e-6 if dtype == "float32" else 2e-2)
        store = max(stored_prefixes(), key=lambda p: p.used).key
        folder = Path(os.environ["CROSSFT_CACHE"]) / "prefix" / store
        sizes.append(sum(p.stat().st_size for p in folder.glob("*.values")))
    assert near > 1e-6
    assert sizes[0] == 2 * sizes[1]


def test_it_needs_a_task_and_data_of_crossft() -> None:
    with pytest.raises(ConfigError, match=r"methods.cache needs a crossft task"):
        PrefixCache().setup(Trainer(logger=False, enable_checkpointing=False), LightningModule(), "fit")


def test_sharded_weights_are_not_cached(images: Path) -> None:
    data = image_data(images)
    task = Classification(TinyVision(), list(data.domains))
    with pytest.warns(UserWarning, match="ModelParallelStrategy cuts weights into pieces; nothing is cached"):
        PrefixCache().setup(SimpleNamespace(datamodule=data, strategy=ModelParallelStrategy()), task, "fit")
    assert task.prefix is None
