"""SWAD: the valley of the paper's algorithm on made-up losses, and the model that a fit ends with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossft.callbacks.adaptation import SWAD
from crossft.callbacks.adaptation.swad import LossValley
from crossft.errors import ConfigError


def averaged(losses: list[float], converge: int, patience: int, tolerance: float) -> list[int] | None:
    """Numbers of the evaluations t_s .. t_e by the algorithm, read off the whole list of losses."""
    start, end, threshold = None, len(losses) - 1, 0.0
    for i in range(len(losses)):
        if start is None:
            window = losses[i - converge + 1 : i + 1]
            if i >= converge - 1 and window[0] == min(window):
                start, threshold = i - converge + 1, tolerance * sum(window) / converge
        elif i >= patience - 1 and min(losses[i - patience + 1 : i + 1]) > threshold:
            end = i - patience
            break
    return None if start is None else list(range(start, end + 1))


def run(losses: list[float], *settings, save_at: int = -1) -> float | None:
    """The average by ``LossValley`` where segment i has the weight 2^i and i + 1 steps."""
    valley = LossValley(*settings)
    for i, loss in enumerate(losses):
        if i == save_at:
            state = valley.state_dict()
            valley = LossValley(*settings)
            valley.load_state_dict(state)
        valley.add([torch.tensor([2.0**i])], i + 1, loss)
    found = valley.average()
    return None if found is None else float(found[0])


def expected(losses: list[float], *settings) -> float | None:
    which = averaged(losses, *settings)
    return None if which is None else sum((i + 1) * 2.0**i for i in which) / sum(i + 1 for i in which)


def test_a_valley_by_hand() -> None:
    losses = [9.0, 5.0, 4.0, 4.5, 4.2, 4.4, 9.0, 9.0, 9.0, 1.0]
    assert averaged(losses, 3, 2, 1.3) == [2, 3, 4, 5]  # from the first low to the last before two above 5.5
    assert run(losses, 3, 2, 1.3) == pytest.approx(expected(losses, 3, 2, 1.3))


@pytest.mark.parametrize("settings", [(3, 6, 1.3), (3, 2, 1.1), (1, 1, 1.0), (2, 3, 1.05), (4, 1, 1.2)])
def test_any_losses_give_the_stretch_of_the_algorithm(settings) -> None:
    rng = np.random.default_rng(0)
    found = []
    for trial in range(60):
        losses = (1 + np.cumsum(rng.normal(0, 0.3, 15)) ** 2).tolist()
        value = run(losses, *settings, save_at=trial % 15)
        assert value == pytest.approx(expected(losses, *settings))
        found.append(value)
    assert len(set(found)) > 5


def test_losses_that_only_fall_have_no_valley() -> None:
    assert run([5.0, 4.0, 3.0, 2.0, 1.0], 3, 6, 1.3) is None


@pytest.mark.parametrize("settings", [{"converge": 0}, {"patience": 0}, {"tolerance": 0.9}])
def test_bad_settings_are_named(settings) -> None:
    with pytest.raises(ConfigError, match="all must be at least 1"):
        SWAD(**settings)
