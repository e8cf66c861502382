import numpy as np
import pytest

from crossft.errors import ConfigError
from crossft.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

# rows: after domain 1, 2, 3; columns: accuracy on domain 1, 2, 3
R = [
    [0.90, 0.30, 0.20],
    [0.95, 0.80, 0.40],
    [0.60, 0.70, 0.85],
]


def test_by_hand() -> None:
    assert average_accuracy(R) == pytest.approx((0.60 + 0.70 + 0.85) / 3)
    assert backward_transfer(R) == pytest.approx(((0.60 - 0.90) + (0.70 - 0.80)) / 2)
    assert forward_transfer(R, [0.1, 0.25, 0.3]) == pytest.approx(((0.30 - 0.25) + (0.40 - 0.3)) / 2)
    # the best earlier row of domain 1 is the second, not the diagonal
    assert forgetting(R) == pytest.approx(((0.95 - 0.60) + (0.80 - 0.70)) / 2)
    assert learning_accuracy(R) == pytest.approx((0.90 + 0.80 + 0.85) / 3)


def test_forgetting_may_be_negative() -> None:
    improved = np.array([[0.5, 0.1], [0.7, 0.9]])
    assert forgetting(improved) == pytest.approx(-0.2)  # the variant without the last row in the maximum
    assert backward_transfer(improved) == pytest.approx(0.2)


def test_what_was_not_measured_counts_only_where_it_is_read() -> None:
    lower = np.array([[0.5, np.nan], [0.7, 0.9]])
    assert backward_transfer(lower) == pytest.approx(0.2)
    assert forward_transfer(lower, [0, 0]) is None


def test_one_domain() -> None:
    assert average_accuracy([[0.5]]) == learning_accuracy([[0.5]]) == 0.5
    assert backward_transfer([[0.5]]) is None
    assert forgetting([[0.5]]) is None
    assert forward_transfer([[0.5]], [0.1]) is None


@pytest.mark.parametrize("bad", [[0.1, 0.2], [[0.1, 0.2]], [], [[[0.1]]]])
def test_shape(bad: list[object]) -> None:
    for function in (average_accuracy, backward_transfer, forgetting, learning_accuracy):
        with pytest.raises(ConfigError, match="must be square"):
            function(bad)
    with pytest.raises(ConfigError, match="baseline has shape"):
        forward_transfer(R, [0.1, 0.2])
