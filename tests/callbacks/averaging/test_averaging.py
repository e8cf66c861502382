"""EMA, SWA and WiSE-FT inside a fit: what is validated, saved and left in the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from retention_cases import data_of, fit, images

from crossft.callbacks.averaging import EMA, SWA, WiSEFT
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, load_checkpoint
from crossft.errors import ConfigError
from crossft.functional.averaging import warmed_decay

Weights = list[torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def now(task) -> Weights:
    state = task.state_dict()
    return [state[k].detach().clone() for k in sorted(state) if state[k].is_floating_point()]


def close(a: Weights, b: Weights) -> bool:
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))


class Watch(Callback):
    """Weights at the start, after each optimizer step, and inside a validation."""

    def __init__(self) -> None:
        self.start: Weights = []
        self.seen: list[Weights] = []
        self.validated: Weights = []

    def on_train_start(self, trainer, task) -> None:
        self.start = now(task)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen.append(now(task))

    def on_validation_batch_start(self, trainer, task, *_) -> None:
        self.validated = now(task)


def watched(root: Path, method: Callback, batchnorm: bool = True, **kwargs) -> tuple[Watch, Weights]:
    watch = Watch()
    more = {"batchnorm": batchnorm, "accumulation": 2, "max_steps": 6, "limit_val_batches": 1.0, **kwargs}
    extra = (watch, *more.pop("extra", ()))
    _, task = fit(data_of(root, more["accumulation"]), {"average": method}, extra=extra, **more)
    return watch, now(task)


@pytest.mark.parametrize("warm_up", [True, False])
def test_ema_is_the_recursion_over_optimizer_steps(root: Path, warm_up: bool) -> None:
    watch, end = watched(root, EMA(decay=0.7, warm_up=warm_up))
    average = watch.start
    for t, weights in enumerate(watch.seen):
        d = warmed_decay(0.7, t) if warm_up else 0.7
        average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
    assert len(watch.seen) == 6
    assert close(end, average)
    assert not close(end, watch.seen[-1])


def test_swa_is_the_mean_of_the_weights_after_its_start(root: Path) -> None:
    watch, end = watched(root, SWA(start=0.5))
    mean = [torch.stack(w).mean(0) for w in zip(*watch.seen[2:], strict=True)]  # steps with progress >= 3/6
    assert close(end, mean)
    watch, end = watched(root, SWA(start=0.0, every_n_steps=2))
    assert close(end, [torch.stack(w).mean(0) for w in zip(*watch.seen[1::2], strict=True)])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_wise_ft_publishes_a_blend_and_both_ends_are_exact(root: Path, alpha: float) -> None:
    watch, end = watched(root, WiSEFT(alpha))
    last = watch.seen[-1]
    assert close(end, [(1 - alpha) * a + alpha * b for a, b in zip(watch.start, last, strict=True)])
    if alpha in (0.0, 1.0):
        exact = watch.start if alpha == 0.0 else last
        assert all(torch.equal(a, b) for a, b in zip(end, exact, strict=True))


def test_training_goes_on_untouched(root: Path) -> None:
    plain, _ = watched(root, Callback())
    for method in (EMA(0.5), SWA(0.0), WiSEFT(0.2)):
        watch, _ = watched(root, method, val_check_interval=1)
        assert all(
            torch.equal(a, b) for x, y in zip(plain.seen, watch.seen, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_validation_and_checkpoints_hold_the_published_weights_and_the_others_beside(
    root: Path, tmp_path: Path
) -> None:
    more = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_steps": -1, "max_epochs": 2}
    watch, end = watched(root, EMA(0.5), extra=(Checkpoints(tmp_path),), **more)
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    state, raw = saved["state_dict"], saved["training_weights"]
    names = sorted(k for k in state if state[k].is_floating_point())
    assert close([state[k] for k in names], end)
    assert close(watch.validated, end)
    assert close([raw[k] for k in names], watch.seen[-1])
    assert state["backbone.middle.1.num_batches_tracked"] == 2 * len(watch.seen)
    assert all(raw[k].is_floating_point() for k in raw)


def test_heads_may_stay_out_of_a_blend(root: Path) -> None:
    _, whole = watched(root, WiSEFT(0.0))
    watch, part = watched(root, WiSEFT(0.0, heads=False))
    same = [torch.equal(a, b) for a, b in zip(whole, part, strict=True)]
    assert same.count(False) == 2  # the head's weight and bias are the fine-tuned ones
    assert all(torch.equal(a, b) for a, b, s in zip(part, watch.seen[-1], same, strict=True) if not s)


def test_two_methods_that_publish_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="both publish weights"):
        fit(data_of(root), {"ema": EMA(), "swa": SWA()})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EMA(decay=1.0), "decay=1"),
        (lambda: SWA(start=1.0), "start=1"),
        (lambda: SWA(every_n_steps=0), "every_n_steps=0"),
        (lambda: WiSEFT(alpha=1.5), "alpha=1.5"),
    ],
)
def test_bad_settings_are_named(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
