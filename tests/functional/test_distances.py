"""Kernels, discrepancies and moments against loops in NumPy, and against facts about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossft.functional import (
    central_moment_discrepancy,
    coral,
    gaussian_kernel,
    mmd_linear,
    mmd_unbiased,
    paired_kernel,
    squared_distances,
)
from crossft.functional.kernels import BANDWIDTHS

ESTIMATES = {
    "unbiased": lambda z, m, **kwargs: mmd_unbiased(gaussian_kernel(z, **kwargs), m),
    "linear": lambda z, m, **kwargs: mmd_linear(paired_kernel(z, m, **kwargs)),
}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(5, 3)), RNG.normal(1.0, 2.0, size=(4, 3))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(a, requires_grad=True) for a in arrays]


def kernel_by_loops(z: np.ndarray, bandwidths=BANDWIDTHS, scale: float | None = None) -> np.ndarray:
    n = len(z)
    d = np.array([[((a - b) ** 2).sum() for b in z] for a in z])
    scale = scale or sum(d[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return sum(np.exp(-d / (u * scale)) for u in bandwidths)


@pytest.mark.parametrize("scale", [None, 1.68])
def test_the_kernel_is_a_sum_of_gaussians_on_the_mean_distance(scale: float | None) -> None:
    z = np.concatenate([X, Y])
    assert np.allclose(gaussian_kernel(torch.tensor(z), scale=scale).numpy(), kernel_by_loops(z, scale=scale))


def test_distances_survive_a_large_offset_in_float32() -> None:
    x = torch.tensor(X, dtype=torch.float32) + 1000
    exact = x.double().numpy()
    expected = np.array([[((a - b) ** 2).sum() for b in exact] for a in exact])
    assert np.allclose(squared_distances(x).numpy(), expected, atol=1e-6)
    assert (squared_distances(x.bfloat16()).dtype) == torch.float32


def test_unbiased_mmd_is_equation_3_of_gretton() -> None:
    k = kernel_by_loops(np.concatenate([X, Y]))
    m, n = 5, 4
    xx = sum(k[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k[m + i, m + j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k[i, m + j] for i in range(m) for j in range(n)) / (m * n)
    assert float(mmd_unbiased(torch.tensor(k), m)) == pytest.approx(xx + yy - 2 * xy)


@pytest.mark.parametrize("scale", [None, 1.68])
def test_linear_mmd_is_lemma_14_of_gretton(scale: float | None) -> None:
    z = np.concatenate([X, Y])
    k = kernel_by_loops(z, scale=scale)
    m = 5
    h = [
        k[i, i + 1] + k[m + i, m + i + 1] - k[i, m + i + 1] - k[i + 1, m + i]
        for i in (0, 2)  # two pairs: y has four rows, the fifth of x is left over
    ]
    assert float(mmd_linear(paired_kernel(torch.tensor(z), m, scale=scale))) == pytest.approx(sum(h) / 2)


def test_linear_mmd_needs_no_square_of_the_rows() -> None:
    """A kernel over all of these rows would take 160 GB."""
    z = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    assert abs(float(mmd_linear(paired_kernel(z, 100_000)))) < 0.05


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_mmd_is_unbiased_at_zero_and_positive_between_different_laws(estimate) -> None:
    generator = torch.Generator().manual_seed(0)
    same, other = [], []
    for _ in range(400):
        x, y = (torch.randn(8, 2, generator=generator) for _ in range(2))
        same.append(estimate(torch.cat([x, y]), 8, bandwidths=(1.0,), scale=2.0))
        other.append(estimate(torch.cat([x, y + 1.5]), 8, bandwidths=(1.0,), scale=2.0))
    same, other = torch.stack(same), torch.stack(other)
    assert abs(float(same.mean())) < 3 * float(same.std()) / 20
    assert (same < 0).any()
    assert float(other.mean()) > 10 * float(other.std()) / 20


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_too_few_rows_give_zero_with_a_gradient(estimate) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    loss = estimate(x, 1)
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_equal_rows_give_no_nan() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    loss = mmd_unbiased(gaussian_kernel(x), 2)
    assert loss == 0
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_coral_is_equation_1() -> None:
    d = X.shape[1]
    expected = ((np.cov(X.T) - np.cov(Y.T)) ** 2).sum() / (4 * d * d)
    assert float(coral(*tensors(X, Y)).detach()) == pytest.approx(expected)
    assert float(coral(*tensors(X, X + 3.0))) == pytest.approx(0, abs=1e-12)  # means do not matter


def test_cmd_is_definition_2() -> None:
    def moment(z: np.ndarray, k: int) -> np.ndarray:
        return ((z - z.mean(0)) ** k).mean(0)

    for moments, width in ((5, 1.0), (3, 2.0), (1, 1.0)):
        expected = np.linalg.norm(X.mean(0) - Y.mean(0)) / width
        expected += sum(np.linalg.norm(moment(X, k) - moment(Y, k)) / width**k for k in range(2, moments + 1))
        assert float(central_moment_discrepancy(*tensors(X, Y), moments, width)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "distance",
    [
        coral,
        central_moment_discrepancy,
        *(lambda x, y, f=f: f(torch.cat([x, y]), len(x), scale=2.0) for f in ESTIMATES.values()),
    ],
)
def test_gradients(distance) -> None:
    assert torch.autograd.gradcheck(distance, tensors(X, Y))


@pytest.mark.parametrize("distance", [coral, central_moment_discrepancy])
def test_equal_and_missing_sides_have_finite_gradients(distance) -> None:
    x = torch.tensor(X, requires_grad=True)
    for other in (x, torch.zeros(0, 3, dtype=torch.float64)):
        loss = distance(x, other)
        assert loss == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
