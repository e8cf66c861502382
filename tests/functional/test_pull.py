"""A penalty's gradient is added without a copy of the model: in blocks on a CPU, in groups of tensors on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from crossft.callbacks.retention.l2sp import L2SPPenalty
from crossft.callbacks.retention.quadratic import QuadraticPenalty
from crossft.functional.pull import BLOCK, GROUP, _groups
from crossft.types import WeightPenalty


@pytest.mark.parametrize(
    "sizes", [[1], [GROUP, 1], [GROUP // 2] * 5, [3 * GROUP, 1, 1], [1, 3 * GROUP, 1], [GROUP - 1, 1, 1]]
)
def test_groups_follow_one_another_and_are_small(sizes: list[int]) -> None:
    found = list(_groups(sizes))
    assert [i for first, last in found for i in range(first, last)] == list(range(len(sizes)))
    assert all(last - first == 1 or sum(sizes[first:last]) <= GROUP for first, last in found)
    assert len(found) <= 1 + 2 * sum(sizes) // GROUP


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes anew, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_flatten(args)[0] if isinstance(t, Tensor)}
        for made in tree_flatten(out)[0]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("kind", ["l2sp", "quadratic"])
def test_a_step_needs_no_memory_but_a_block(kind: str) -> None:
    """What a penalty stores is the anchors (and the importance); a step makes nothing of a weight's size."""
    weight = nn.Parameter(torch.randn(3 * BLOCK + 5))
    weight.grad = torch.zeros_like(weight)
    penalty: WeightPenalty = QuadraticPenalty({"w": weight}) if kind == "quadratic" else L2SPPenalty([weight], [], 0.0)
    if isinstance(penalty, QuadraticPenalty):
        penalty.fill({"w": torch.rand(len(weight))}, {})
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    stored = sum(b.numel() for b in penalty.buffers())
    with Largest() as largest:
        penalty.add_grad_(2.0)
    assert 0 < largest.elements <= BLOCK
    assert sum(b.numel() for b in penalty.buffers()) == stored <= 2 * len(weight) + 1
    factor = penalty.importance_of("w") if isinstance(penalty, QuadraticPenalty) else 1.0
    assert torch.allclose(weight.grad, 2.0 * factor * (weight.detach() - start))
