import math

import pytest

from crossft.metrics import gain, primary_metric, retention


@pytest.mark.parametrize(
    ("before", "after", "higher", "kept", "gained"),
    [
        (0.8, 0.6, True, 0.75, -0.2),
        (0.5, 0.5, True, 1.0, 0.0),
        (0.8, 0.0, True, 0.0, -0.8),
        (0.0, 0.5, True, None, 0.5),
        (-0.2, 0.5, True, None, 0.7),  # R2 or a correlation below zero
        (0.2, -3.0, True, None, -3.2),
        (2.0, 4.0, False, 0.5, -2.0),
        (4.0, 2.0, False, 2.0, 2.0),
        (0.0, 1.0, False, None, -1.0),
        (1.0, 0.0, False, None, 1.0),
        (None, 0.5, True, None, None),
        (0.5, None, True, None, None),
        (math.nan, 0.5, True, None, None),
        (0.5, math.inf, False, None, None),
    ],
)
def test_retention_and_gain(
    before: float | None, after: float | None, higher: bool, kept: float | None, gained: float | None
) -> None:
    assert retention(before, after, higher) == (None if kept is None else pytest.approx(kept))
    assert gain(before, after, higher) == (None if gained is None else pytest.approx(gained))


def test_primary_metrics() -> None:
    assert primary_metric("multiclass") == ("accuracy", True)
    assert primary_metric("multilabel") == ("average_precision", True)
    assert primary_metric("regression") == ("mae", False)
