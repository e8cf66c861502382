import math

import pytest
import torch
from tiny import TinyVision
from torch import nn

from crossft.errors import ConfigError
from crossft.optim import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    OneCycle,
    Phased,
    Plateau,
    SlantedTriangular,
    parameter_groups,
    set_rates_,
)


@pytest.mark.parametrize("schedule", [Constant(warmup=4), Linear(warmup=0.4), Cosine(warmup=4)])
def test_warmup_is_linear_and_reaches_one(schedule) -> None:
    assert [schedule(s, 10) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_closed_forms_after_the_warmup() -> None:
    for step in range(2, 12):
        share = (step - 2) / 10
        assert Linear(warmup=2, final=0.1)(step, 12) == pytest.approx(0.1 + 0.9 * (1 - share))
        assert Cosine(warmup=2)(step, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * share)))
        assert Constant(warmup=2)(step, 12) == 1.0


def test_the_end_is_final_and_stays() -> None:
    assert Linear(final=0.25)(10, 10) == Linear(final=0.25)(15, 10) == pytest.approx(0.25)
    assert Cosine()(10, 10) == pytest.approx(0.0)


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"final": 2.0}])
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Cosine(**bad)


def torch_trace(make, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, seen = make(optimizer), []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("total", [10, 37, 100])
def test_one_cycle_equals_torch(total: int) -> None:
    exact = torch_trace(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total), total - 1)
    mine = [OneCycle()(s, total) for s in range(total)]
    assert mine[:-1] == pytest.approx(exact)
    assert mine[-1] == pytest.approx(1 / (25 * 1e4))


def test_slanted_triangular_equals_equation_3() -> None:
    total, cut_frac, ratio = 200, 0.1, 32
    cut = math.floor(total * cut_frac)
    for t in range(total):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert SlantedTriangular()(t, total) == pytest.approx((1 + p * (ratio - 1)) / ratio)
    assert SlantedTriangular()(0, total) == SlantedTriangular()(total, total) == pytest.approx(1 / 32)
    assert SlantedTriangular()(20, total) == 1.0


def test_inverse_sqrt_equals_equation_3_scaled_to_its_peak() -> None:
    for step in range(1, 60):
        equation = min(step**-0.5, step * 8**-1.5)
        assert InverseSqrt(warmup=8)(step - 1, 100) == pytest.approx(equation / 8**-0.5)


def test_plateau_equals_torch_and_resumes() -> None:
    values = [1.0, 0.9, 0.91, 0.92, 0.93, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.5, 1)
    schedule = Plateau("target/val/loss", factor=0.5, patience=1, warmup=2)
    for i, value in enumerate(values):
        rule.step(value)
        schedule.observe({"target/val/loss": torch.tensor(value)})
        assert schedule(7, 10) == optimizer.param_groups[0]["lr"]
        other = Plateau("target/val/loss", factor=0.5, patience=1, warmup=2)
        other.load_state_dict(schedule.state_dict())
        if i % 3 == 0:
            schedule = other
    assert schedule(7, 10) < 0.5
    assert schedule(0, 10) == pytest.approx(schedule(7, 10) / 3)
    with pytest.raises(ConfigError, match=r"target/val/loss.*target/val/accuracy"):
        schedule.observe({"target/val/accuracy": 1.0})


@pytest.mark.parametrize("thaw", [0, 3, 11])
def test_phases_keep_rewarm_and_restart_against_closed_forms(thaw: int) -> None:
    base, total = Linear(warmup=2), 20
    phased = Phased(base)
    for step in range(total):
        assert phased(step, total) == base(step, total)
    phased.begin(thaw, None, "rewarm", warmup=4, factor=0.5)
    for step in range(thaw, total):
        again = min(1.0, (step - thaw + 1) / 5)
        assert phased(step, total) == pytest.approx(0.5 * again * base(step, total))
    phased.begin(thaw, 6, "restart")
    assert [phased(thaw + s, total) for s in range(6)] == [base(s, 6) for s in range(6)]
    phased.begin(thaw, None, "restart")
    assert [phased(s, total) for s in range(thaw, total)] == [base(s, total - thaw) for s in range(total - thaw)]


def test_rates_of_every_named_group_follow_their_own_initial_rate() -> None:
    """A group that thaws late has had its rate set all along, so it enters at the schedule's value."""
    backbone, heads = TinyVision(), nn.ModuleDict({"a": nn.Linear(12, 2)})
    made = parameter_groups(backbone.stages, heads, lr=0.4, layer_decay=0.5, head_multiplier=2.0)
    optimizer, schedule = torch.optim.SGD(made), Cosine(warmup=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, 12))
    own = {"stem": 0.1, "middle": 0.2, "last": 0.4, "head.a": 0.8}
    for step in range(12):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(own[group["name"].split("/")[0]] * schedule(step, 12))
        optimizer.step()
        scheduler.step()
    set_rates_(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25 * g["initial_lr"] for g in optimizer.param_groups]
