"""Scores without target labels: closed forms, and NumPy re-derivations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crossft.functional.selection import (
    deep_embedded_validation,
    importance_weighted_risk,
    importance_weights,
    information_maximization,
    mean_entropy,
    soft_neighborhood_density,
)

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(9, 4))
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)


def sure(classes: list[int], k: int) -> torch.Tensor:
    """Logits of predictions that are sure."""
    return 1e4 * torch.nn.functional.one_hot(torch.tensor(classes), k).double()


def test_entropy_and_infomax_equal_numpy() -> None:
    rows = -(P * np.log(P)).sum(1)
    marginal = P.mean(0)
    assert float(mean_entropy(torch.tensor(Z))) == pytest.approx(rows.mean())
    expected = -(marginal * np.log(marginal)).sum() - rows.mean()
    assert float(information_maximization(torch.tensor(Z))) == pytest.approx(expected)


def test_infomax_sees_a_collapse_that_entropy_takes_for_good() -> None:
    balanced, collapsed = sure([0, 1, 2] * 4, 3), sure([1] * 12, 3)
    assert float(mean_entropy(balanced)) == float(mean_entropy(collapsed)) == 0.0
    assert float(information_maximization(balanced)) == pytest.approx(math.log(3))
    assert float(information_maximization(collapsed)) == 0.0


def test_density_of_clusters_in_closed_form() -> None:
    """c clusters of m rows: each row sees m - 1 rows at similarity 1 and the others at 0."""
    c, m, t = 3, 4, 0.5
    n, a = c * m, math.exp(1 / 0.5)
    z = (m - 1) * a + (n - m)
    expected = -(m - 1) * a / z * math.log(a / z) - (n - m) / z * math.log(1 / z)
    assert float(soft_neighborhood_density(sure([0, 1, 2] * m, c), t)) == pytest.approx(expected)


def test_density_equals_numpy_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    f = P / np.linalg.norm(P, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(f)):
        s = np.delete(f @ f[i], i) / 0.05
        q = np.exp(s - s.max())
        q /= q.sum()
        total -= (q * np.log(q)).sum()
    assert float(soft_neighborhood_density(torch.tensor(Z))) == pytest.approx(total / len(f))
    monkeypatch.setattr("crossft.functional.selection._CHUNK", 4)
    assert float(soft_neighborhood_density(torch.tensor(Z))) == pytest.approx(total / len(f))
    assert math.isnan(float(soft_neighborhood_density(torch.tensor(Z[:1]))))


def test_weights_are_the_density_ratio() -> None:
    """Source N(0, 1), target N(1, 1), 2 source rows for each target row: the ratio is exp(x - 1/2)."""
    x = torch.linspace(-2, 3, 11).double()
    ratio = torch.exp(x - 0.5)
    p_target = ratio / (ratio + 2.0)
    assert torch.allclose(importance_weights(p_target, 200, 100), ratio)
    assert torch.isfinite(importance_weights(torch.tensor([0.0, 1.0]), 1, 1)).all()


def test_weighted_risks_equal_the_released_code() -> None:
    """``get_dev_risk`` of You et al.'s release, in NumPy."""
    losses, weights = RNG.random(20), RNG.random(20) * 3
    weighted = losses * weights
    eta = -np.cov(weighted, weights, ddof=1)[0, 1] / np.var(weights, ddof=1)
    expected = weighted.mean() + eta * weights.mean() - eta
    pair = torch.tensor(losses), torch.tensor(weights)
    assert float(deep_embedded_validation(*pair)) == pytest.approx(expected)
    assert float(importance_weighted_risk(*pair)) == pytest.approx(weighted.mean())


def test_the_control_variate_makes_a_constant_loss_exact() -> None:
    """Whatever the weights, the risk of a loss that is 0.7 everywhere is 0.7; without it, 0.7 times their mean."""
    weights = torch.tensor(RNG.random(30) * 5)
    losses = torch.full((30,), 0.7).double()
    assert float(deep_embedded_validation(losses, weights)) == pytest.approx(0.7)
    assert float(importance_weighted_risk(losses, weights)) == pytest.approx(0.7 * float(weights.mean()))
    equal = torch.ones(30).double()
    assert float(deep_embedded_validation(torch.linspace(0, 1, 30).double(), equal)) == pytest.approx(0.5)
