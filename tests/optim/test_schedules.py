import math

import pytest

from crossft.errors import ConfigError
from crossft.optim import Constant, Cosine, Linear


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
