"""Learning rates of every named group in real fits, against closed forms: every schedule, at every thaw point."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_gradual import fit
from tiny import image_domains

from crossft.callbacks.freezing import GradualUnfreezing, Phase
from crossft.optim import Constant, Cosine, InverseSqrt, Linear, OneCycle, Plateau, Schedule, SlantedTriangular

THAWS = (4, 9, 12)
PLAN = [
    Phase(train_last=0, steps=4),
    Phase(train_last=1, steps=5, rates="rewarm", warmup=2, lr=0.5),
    Phase(train_last=2, steps=3, rates="restart", lr=2.0),
    Phase(),
]
EPOCHS, STEPS = 6, 3
TOTAL = EPOCHS * STEPS
DEPTH = {"stem": 2, "middle": 1, "last": 0}


def after_warmup(decay: Callable[[float], float], warmup: int) -> Callable[[int, int], float]:
    """A linear rise to 1 over ``warmup`` steps, then ``decay`` of the share of the others that is done."""
    return lambda t, n: (t + 1) / (warmup + 1) if t < warmup else decay((t - warmup) / max(1, n - warmup))


def one_cycle(t: int, n: int) -> float:
    """torch's OneCycleLR over its maximum, by its documented phases."""
    peak, low, end = 0.3 * n - 1, 1 / 25, 1 / (25 * 1e4)
    if t <= peak:
        return low + (1 - low) * (1 - math.cos(math.pi * t / peak)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, (t - peak) / max(1.0, n - 1 - peak)))) / 2


def slanted(t: int, n: int) -> float:
    """Howard & Ruder 2018, eq. 3, with p in [0, 1]."""
    cut = max(1, math.floor(n * 0.1))
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
    return (1 + min(1.0, max(0.0, p)) * 31) / 32


CASES: dict[str, tuple[Schedule, Callable[[int, int], float]]] = {
    "constant": (Constant(), lambda t, n: 1.0),
    "constant, warmup": (Constant(warmup=3), after_warmup(lambda share: 1.0, 3)),
    "linear": (Linear(warmup=3, final=0.1), after_warmup(lambda share: 1 - 0.9 * share, 3)),
    "cosine": (Cosine(warmup=3), after_warmup(lambda share: (1 + math.cos(math.pi * share)) / 2, 3)),
    "one cycle": (OneCycle(), one_cycle),
    "slanted triangular": (SlantedTriangular(), slanted),
    "inverse square root": (InverseSqrt(warmup=3), lambda t, n: min((t + 1) / 3, math.sqrt(3 / (t + 1)))),
}


def phased(form: Callable[[int, int], float], step: int, total: int = TOTAL) -> float:
    """What the plan makes of a schedule: keep; warm up again at half the rate; anew for 3 steps at twice it; keep."""
    if step < THAWS[0]:
        return form(step, total)
    if step < THAWS[1]:
        return 0.5 * form(step, total) * min(1.0, (step - THAWS[0] + 1) / 3)
    if step < THAWS[2]:
        return 2.0 * form(step - THAWS[1], THAWS[2] - THAWS[1])
    return form(step, total)


class Rates(Callback):
    """The learning rate of every group at every optimizer step, and which groups have gradients."""

    def __init__(self, scores: list[float] | None = None) -> None:
        self.rates: list[dict[str, float]] = []
        self.moving: list[set[str]] = []
        self.scores = scores

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if self.scores is not None:
            pl_module.log("scripted", torch.tensor(self.scores[trainer.current_epoch]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append({g["name"]: g["lr"] for g in optimizer.param_groups})
        moving = {g["name"] for g in optimizer.param_groups if any(p.grad is not None for p in g["params"])}
        self.moving.append({name.partition("/")[0] for name in moving})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("traces") / "data", each=16)


def own(group: str) -> float:
    """A group's own rate: 3e-4, halved for each stage of depth; heads three times it."""
    stage = group.partition("/")[0]
    return 3e-4 * (0.5 ** DEPTH[stage] if stage in DEPTH else 3.0)


@pytest.mark.parametrize("name", CASES)
def test_every_group_follows_its_closed_form_through_every_thaw(name: str, root: Path) -> None:
    schedule, form = CASES[name]
    seen = Rates()
    fit(root, [GradualUnfreezing(PLAN), seen], schedule=schedule, layer_decay=0.5, max_epochs=EPOCHS)
    assert len(seen.rates) == TOTAL
    for step, rates in enumerate(seen.rates):
        expected = {group: own(group) * phased(form, step) for group in rates}
        assert len(expected) == 8
        assert rates == pytest.approx(expected, rel=1e-9), step
        thawed = sum(step >= thaw for thaw in THAWS)
        assert seen.moving[step] == {"head.photo", *["last", "middle", "stem"][:thawed]}, step


def test_a_plateaus_drops_reach_every_group_through_every_thaw(root: Path) -> None:
    """Validations end epochs of 3 steps; from the second on each halves the rate, from the step after the next on.

    The phase that restarts at step 9 begins the plateau anew: its first validation, the fourth, is a best one again.
    """
    seen = Rates(scores=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    schedule = Plateau("scripted", "max", factor=0.5, patience=0, warmup=3)
    fit(root, [GradualUnfreezing(PLAN), seen], schedule=schedule, layer_decay=0.5, max_epochs=EPOCHS)

    def drops(step: int) -> int:
        waits = 0 if step in THAWS else 1  # a phase sets the rates of its first step itself
        bad = (2, 3) if step < THAWS[1] else (5, 6)
        return sum(step >= STEPS * validation + waits for validation in bad)

    for step, rates in enumerate(seen.rates):
        local = step - THAWS[1] if THAWS[1] <= step < THAWS[2] else step
        warm = min(1.0, (local + 1) / 4)
        factor = {0: 1.0, 1: 0.5 * min(1.0, (step - THAWS[0] + 1) / 3), 2: 2.0, 3: 1.0}[sum(step >= t for t in THAWS)]
        expected = {group: own(group) * warm * factor * 0.5 ** drops(step) for group in rates}
        assert rates == pytest.approx(expected, rel=1e-9), step
