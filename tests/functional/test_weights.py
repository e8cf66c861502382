"""Mixout, memories, projections and averages on numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossft.errors import CheckpointError, ConfigError
from crossft.functional.averaging import average, greedy_soup, interpolate, warmed_decay
from crossft.functional.memory import balanced, herding, reservoir, shares
from crossft.functional.mixing import drawn_mask, mixout
from crossft.functional.projection import project_off


def test_mixout_has_the_right_gradient() -> None:
    """Lee et al. 2020, eq. 4; the released code's backward lacks 1 / (1 - p)."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, generator=g, requires_grad=True)
    w0, mask = torch.randn(3, 4, dtype=torch.float64, generator=g), torch.rand(3, 4, generator=g) < 0.6
    assert torch.autograd.gradcheck(lambda x: mixout(x, w0, mask, 0.6), w)
    (grad,) = torch.autograd.grad(mixout(w, w0, mask, 0.6).sum(), w)
    assert torch.allclose(grad, (~mask).double() / 0.4)


def test_the_mean_of_mixout_is_the_weight() -> None:
    w, w0 = torch.randn(6), torch.randn(6)
    masks = [drawn_mask((6,), 0.7, seed, w.device) for seed in range(20000)]
    mean = torch.stack([mixout(w, w0, m, 0.7) for m in masks]).mean(0)
    assert (mean - w).abs().max() < 0.05 * (w - w0).abs().max() + 0.01
    assert torch.stack(masks).float().mean() == pytest.approx(0.7, abs=0.01)


def test_masks_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (drawn_mask((50,), 0.5, s, torch.device("cpu")) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_a_reservoir_is_uniform() -> None:
    counts = np.bincount(np.concatenate([reservoir(20, 5, seed) for seed in range(4000)]), minlength=20)
    assert counts.sum() == 20000
    assert np.abs(counts / 1000 - 1).max() < 0.15
    assert reservoir(3, 5).tolist() == [0, 1, 2]


def test_a_balanced_memory_has_as_many_of_each_class_as_there_are() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    assert shares(labels, 15) == {0: 6, 1: 3, 2: 6}
    kept = balanced(labels, 15)
    assert np.bincount(labels[kept]).tolist() == [6, 3, 6]
    assert len(set(kept.tolist())) == 15
    assert len(balanced(labels, 1000)) == 73
    assert sum(shares(labels, 10).values()) == 10


def test_herding_follows_the_class_mean_greedily() -> None:
    """Rebuffi et al. 2017, algorithm 4, by trying every row."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 3)) + 1, np.array([0, 1] * 6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = []
    for c in (0, 1):
        own = [i for i in range(12) if labels[i] == c]
        mean, chosen = unit[own].mean(0), []
        for _ in range(3):
            rest = [i for i in own if i not in chosen]
            chosen.append(min(rest, key=lambda i: np.linalg.norm(mean - unit[[*chosen, i]].mean(0))))
        expected += chosen
    assert herding(x, labels, 6).tolist() == sorted(expected)
    assert set(herding(x, labels, 2)) <= set(herding(x, labels, 6))


def test_a_projected_gradient_never_disagrees() -> None:
    g = torch.Generator().manual_seed(0)
    projected = 0
    for _ in range(50):
        grad, ref = ([torch.randn(s, generator=g) for s in ((3, 2), (4,))] for _ in range(2))
        before = [t.clone() for t in grad]
        dot, square = project_off(grad, ref)
        after = sum(float((a * r).sum()) for a, r in zip(grad, ref, strict=True))
        assert after >= -1e-5
        if dot < 0:
            projected += 1
            expected = [b - float(dot / square) * r for b, r in zip(before, ref, strict=True)]
            assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(grad, expected, strict=True))
            assert after == pytest.approx(0, abs=1e-5)
        else:
            assert all(torch.equal(a, b) for a, b in zip(grad, before, strict=True))
    assert 10 < projected < 40


def states() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(3, generator=g), "mean": torch.rand(2, generator=g), "num_batches_tracked": torch.tensor(i)}
        for i in (3, 8, 5)
    ]


def test_wise_ft_is_the_identity_at_both_ends_and_linear_between() -> None:
    a, b, _ = states()
    for alpha, end in ((0.0, a), (1.0, b)):
        found = interpolate(a, b, alpha)
        assert all(torch.equal(found[k], end[k]) for k in end)
        assert all(found[k].data_ptr() != end[k].data_ptr() for k in end)
    half = interpolate(a, b, 0.3)
    assert torch.allclose(half["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert half["num_batches_tracked"] == 8
    assert half["num_batches_tracked"].dtype == torch.int64


def test_a_soup_is_the_mean_and_never_blends_integers() -> None:
    parts = states()
    soup = average(parts)
    assert torch.allclose(soup["w"], torch.stack([s["w"] for s in parts]).mean(0))
    assert soup["num_batches_tracked"] == 5
    weighted = average(parts, [1, 0, 3])
    assert torch.allclose(weighted["w"], 0.25 * parts[0]["w"] + 0.75 * parts[2]["w"])
    half = average([{"w": torch.tensor([0.1], dtype=torch.bfloat16)}] * 3)
    assert half["w"].dtype == torch.bfloat16


def test_a_greedy_soup_takes_what_helps() -> None:
    values = [0.0, 4.0, 1.0, -3.0]
    parts = [{"w": torch.tensor([v])} for v in values]
    soup, chosen = greedy_soup(parts, lambda s: -abs(float(s["w"]) - 0.4))  # best: nearest to 0.4
    assert chosen == [0, 2]
    assert float(soup["w"]) == 0.5


@pytest.mark.parametrize(
    ("other", "match"),
    [({"w": torch.zeros(4)}, r"'w' is \(3,\)"), ({"v": torch.zeros(3)}, "in one of them only")],
)
def test_models_that_do_not_fit_are_refused(other: dict, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        interpolate({"w": torch.zeros(3)}, other, 0.5)


def test_bad_weights_are_named() -> None:
    with pytest.raises(ConfigError, match=r"weights=\[1.0\]"):
        average(states(), [1.0])
    with pytest.raises(ConfigError, match="no model"):
        average([])


def test_decay_warms_up() -> None:
    assert [warmed_decay(0.9, t) for t in (0, 8, 1000)] == [0.1, 0.5, 0.9]
