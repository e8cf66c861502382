"""Training and evaluation with the prefix cache give what they give without it."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.tiny_models import tiny_text
from callbacks.caching.cached_runs import fit, image_data, metrics, text_data, warned
from lightning.pytorch import Callback
from tiny import TinyVision, flat
from torch import Tensor

from crossft.backbones import Adapted
from crossft.callbacks.adaptation import CORAL, DANN
from crossft.callbacks.base import MethodCallback
from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import DomainGap, Freeze
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, Drift
from crossft.callbacks.retention import L2SP, LwF
from crossft.data import dataset
from crossft.runs import stored_prefixes
from crossft.types import LateInputs, LossTerm

SCHEDULE = {0: 0, 6: 1, 12: 2, 18: 3}
"""Four phases of one and a half epochs: the head, then a stage more each; in steps of 8 rows."""


@pytest.mark.parametrize("phases", [0, 1, 2, SCHEDULE], ids=["probe", "last-1", "last-2", "schedule"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_and_metrics_are_those_without_the_cache(images: Path, phases: Any, accumulation: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulation}
    if isinstance(phases, dict):
        phases = {step // accumulation: last for step, last in phases.items()}
        options |= {"max_epochs": 6, "lr": 0.02}  # at 0.1, 24 steps make 1e-7 of rounding into 1e-5
    plain, trainer = fit(image_data(images), phases, None, **options)
    caches = [PrefixCache(), PrefixCache()]
    for cache in caches:
        task, other = fit(image_data(images), phases, cache, **options)
        assert (flat(task) - flat(plain)).abs().max() < 1e-6
        assert metrics(other) == pytest.approx(metrics(trainer), abs=1e-5)
    assert caches[0].hits > 0
    assert caches[1].misses == 0
    names = {0: {"features"}, 1: {"last"}, 2: {"middle"}}.get(phases if isinstance(phases, int) else -1)
    assert {p.stage for p in stored_prefixes()} == (names or {"features", "last", "middle"})


@pytest.mark.parametrize("last", [0, 1])
def test_a_precision_has_values_of_its_own(images: Path, last: int) -> None:
    """Mixed precision beside what looks at rows before and between epochs, then float32 on the same stores."""

    def run(cache: PrefixCache | None, precision: str) -> Tensor:
        watched = [Freeze(train_last=last), Drift(rows=4, every_n_steps=2), LwF(), DomainGap()]
        methods = [*watched[:1], *([cache] if cache else []), *watched[1:]]  # in the order of a command's run
        return flat(fit(image_data(images), None, None, methods=methods, precision=precision)[0])

    plain = {precision: run(None, precision) for precision in ("bf16-mixed", "32-true")}
    assert (plain["bf16-mixed"] - plain["32-true"]).abs().max() > 1e-5
    for precision in ("bf16-mixed", "32-true", "bf16-mixed"):
        cache = PrefixCache()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = run(cache, precision)
        assert (found - plain[precision]).abs().max() < 1e-6, precision
        assert cache.hits > 0
        assert not warned(caught)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_texts_of_different_lengths(texts: Path, last: int) -> None:
    data = text_data(texts)

    def run(cache: PrefixCache | None, **options: Any) -> tuple[Tensor, dict[str, float]]:
        task, trainer = fit(data, last, cache, partial(tiny_text, "bert", texts / "model"), **options)
        return flat(task), metrics(trainer)

    weights, scores = run(None)
    caches = [PrefixCache(), PrefixCache()]
    for cache in caches:
        cached, others = run(cache)
        assert (cached - weights).abs().max() < 1e-6
        assert others == pytest.approx(scores, abs=1e-5)
    assert caches[1].misses == 0
    assert 30 <= stored_prefixes()[0].rows <= 34  # 15 texts of each domain train, 2 validate


@pytest.mark.parametrize("last", [0, 2])
def test_methods_work_on_top_of_it(images: Path, last: int) -> None:
    def run(cache: PrefixCache | None) -> Tensor:
        methods = [DANN(hidden=4, tokens=True), CORAL(layers=["stem", "last"]), L2SP(weight=0.1)]
        return flat(fit(image_data(images, target_labels="none"), last, cache, methods=methods)[0])

    plain = run(None)
    for _ in range(2):
        assert (run(PrefixCache()) - plain).abs().max() < 1e-6
    assert {p.stage for p in stored_prefixes()} == {"middle"}  # behind the first stage that a method reads


def test_below_the_first_stage_with_adapters(images: Path) -> None:
    def build() -> Adapted:
        return Adapted(TinyVision(dropout=0.2, batchnorm=True), rank=2, stages=["last"])

    def run(cache: PrefixCache | None) -> Tensor:
        return flat(fit(image_data(images), None, cache, build, task_options={"batchnorm": "training"})[0])

    plain, cache = run(None), PrefixCache()
    for each in (PrefixCache(), cache):
        assert (run(each) - plain).abs().max() < 1e-6
    assert cache.misses == 0
    assert {p.stage for p in stored_prefixes()} == {"last"}


@pytest.mark.parametrize("policy", ["frozen", "training", "per_domain", "reestimated"])
def test_every_batchnorm_policy(images: Path, policy: str) -> None:
    def run(cache: PrefixCache | None) -> tuple[Tensor, dict[str, float]]:
        task, trainer = fit(
            image_data(images), {0: 1, 5: 2}, cache, partial(TinyVision, batchnorm=True),
            task_options={"batchnorm": policy},
        )  # fmt: skip
        trainer.test(task, trainer.datamodule, verbose=False)
        return flat(task), metrics(trainer)

    weights, scores = run(None)
    for _ in range(2):
        cached, others = run(PrefixCache())
        assert (cached - weights).abs().max() < 1e-6
        assert others == pytest.approx(scores, abs=1e-5)


def test_fixed_views_are_cached_and_random_ones_are_not(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = flat(fit(image_data(images, augment="flip", views=2), 1, None)[0])
    for expected in (None, 0):
        cache = PrefixCache()
        task, _ = fit(image_data(images, augment="flip", views=2), 1, cache)
        assert (flat(task) - plain).abs().max() < 1e-6
        assert expected is None or cache.misses == expected
    assert not torch.allclose(plain, flat(fit(image_data(images, augment="flip", views=1), 1, None)[0]))

    cache = PrefixCache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = image_data(images, augment="flip")
        task, _ = fit(data, 1, cache)
    assert (flat(task) - flat(fit(image_data(images, augment="flip"), 1, None)[0])).abs().max() < 1e-6
    assert cache.misses == 0  # evaluation inputs were stored by the runs above
    assert cache.hits == 3 * sum(len(p.rows("val")) for p in data.prepared)
    assert "only evaluation is cached" in " ".join(warned(caught))


class Stop(Callback):
    """Dies before an optimizer step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("stopped")


def test_a_stopped_run_resumes_to_the_same_bits(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the fourth epoch of two steps; a stage thawed a step before."""

    def run(name: str, *extra: Callback, **options: Any) -> Tensor:
        monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / name))
        options |= {"accumulate_grad_batches": 2, "max_epochs": 6, "plugins": [AtomicCheckpointIO()]}
        saves = Checkpoints(tmp_path / name, every_n_steps=1, keep=100)
        task, _ = fit(image_data(images), {0: 0, 6: 1}, PrefixCache(), methods=[saves, *extra], **options)
        return flat(task)

    whole = run("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run("stopped", Stop())
    assert torch.equal(run("stopped", resume=tmp_path / "stopped" / "checkpoints" / "step-7.ckpt"), whole)


def test_evaluation_after_the_fit_runs_from_the_cache(images: Path) -> None:
    cache = PrefixCache()
    data = image_data(images)
    task, trainer = fit(data, 1, cache)
    counts = []
    for _ in range(2):
        hits, misses = cache.hits, cache.misses
        trainer.test(task, data, verbose=False)
        counts.append((cache.hits - hits, cache.misses - misses))
    rows = sum(len(p.rows("test")) for p in data.prepared)
    assert counts == [(0, rows), (rows, 0)]
    other = image_data(images)  # other rows than those the cache knows: the full path
    scores = metrics(trainer)
    trainer.test(task, other, verbose=False)
    assert counts[1] == (cache.hits - hits, cache.misses - misses)
    assert metrics(trainer) == pytest.approx(scores, abs=1e-5)


class Reads(MethodCallback):
    """A term that reads the inputs."""

    def build(self, task: Any) -> LossTerm:
        return _Reads(task.backbone)


class _Reads(LossTerm):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self._backbone = [backbone]
        self.late = 0

    def forward(self, step: Any, model: Any) -> Tensor:
        self.late += isinstance(step.batch.inputs, LateInputs)
        with torch.no_grad():
            features = self._backbone[0].eval()(step.batch.inputs).features
        assert torch.allclose(features, step.features, atol=1e-6)
        return step.features.sum() * 0 + features.square().mean()


def test_inputs_are_loaded_for_a_method_that_reads_them(images: Path) -> None:
    fit(image_data(images), 0, PrefixCache())
    task, _ = fit(image_data(images), 0, PrefixCache(), TinyVision, methods=[Reads()])
    late = task.attachments.terms["reads"].late
    assert 0 < late < 15  # of 18 steps; then inputs are loaded ahead again


def test_inputs_of_stored_samples_are_not_decoded(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = dataset.open_image
    monkeypatch.setattr(dataset, "open_image", lambda source: opened.append(source) or original(source))
    counts = []
    for _ in range(2):
        opened.clear()
        fit(image_data(images, cache_images=False), 1, PrefixCache())
        counts.append(len(opened))
    assert counts == [35, 10]  # later: the first batch of training and the first of validation, run both ways


def test_workers_know_what_is_stored(images: Path) -> None:
    plain = flat(fit(image_data(images), 1, None)[0])
    cache = PrefixCache()
    data = image_data(images, num_workers=1)
    task, _ = fit(data, {0: 0, 7: 1}, cache)
    assert (flat(task) - flat(fit(image_data(images), {0: 0, 7: 1}, None)[0])).abs().max() < 1e-6
    task, _ = fit(data, 1, cache)
    assert (flat(task) - plain).abs().max() < 1e-6
