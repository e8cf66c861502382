"""The groups in which a GPU adds a penalty's gradient: all tensors in order, and no copy of the whole model between."""

from __future__ import annotations

import pytest

from crossft.functional.pull import GROUP, _groups


@pytest.mark.parametrize(
    "sizes", [[1], [GROUP, 1], [GROUP // 2] * 5, [3 * GROUP, 1, 1], [1, 3 * GROUP, 1], [GROUP - 1, 1, 1]]
)
def test_groups_follow_one_another_and_are_small(sizes: list[int]) -> None:
    found = list(_groups(sizes))
    assert [i for first, last in found for i in range(first, last)] == list(range(len(sizes)))
    assert all(last - first == 1 or sum(sizes[first:last]) <= GROUP for first, last in found)
    assert len(found) <= 1 + 2 * sum(sizes) // GROUP
