"""Losses on predictions and norms against NumPy, and their gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossft.functional import (
    batch_nuclear_norm,
    classifier_discrepancy,
    entropy,
    log_not,
    minimum_class_confusion,
    spectral_penalty,
    stepwise_norm,
)

RNG = np.random.default_rng(0)
Z, W = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def tensor(a: np.ndarray) -> torch.Tensor:
    return torch.tensor(a, requires_grad=True)


def test_entropy() -> None:
    p = softmax(Z)
    assert np.allclose(entropy(tensor(Z)).detach().numpy(), -(p * np.log(p)).sum(1))
    assert entropy(torch.tensor([[1000.0, 0.0]])) == 0  # no 0 * log 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_class_confusion_step_by_step(temperature: float) -> None:
    p = softmax(Z / temperature)
    h = -(p * np.log(p)).sum(1)
    w = (1 + np.exp(-h)) / (1 + np.exp(-h)).sum() * len(Z)
    c = np.zeros((4, 4))
    for i in range(6):
        c += w[i] * np.outer(p[i], p[i])
    c /= c.sum(1, keepdims=True)
    expected = (c.sum() - np.trace(c)) / 4
    assert float(minimum_class_confusion(tensor(Z), temperature)) == pytest.approx(expected)


def test_sure_and_different_predictions_confuse_no_classes() -> None:
    assert float(minimum_class_confusion(100 * torch.eye(4))) == pytest.approx(0, abs=1e-6)
    assert float(minimum_class_confusion(torch.zeros(4, 4))) == pytest.approx(0.75)


def test_the_row_weights_of_class_confusion_carry_no_gradient() -> None:
    z = tensor(Z)
    gradient = torch.autograd.grad(minimum_class_confusion(z), z)[0]
    p = torch.softmax(z / 2.5, 1)
    w = 1 + torch.exp((p * p.log()).sum(1)).detach()
    c = torch.einsum("b,bi,bj->ij", w / w.sum() * 6, p, p)
    c = c / c.sum(1, keepdim=True)
    assert torch.allclose(gradient, torch.autograd.grad((c.sum() - c.trace()) / 4, z)[0])


def test_nuclear_norm_is_the_sum_of_singular_values() -> None:
    expected = np.linalg.svd(softmax(Z), compute_uv=False).sum() / 6
    assert float(batch_nuclear_norm(tensor(Z))) == pytest.approx(expected)
    sure = batch_nuclear_norm(100 * torch.eye(4))
    assert float(sure) == pytest.approx(1.0)  # all classes, all sure: sqrt(b k) / b at b = k
    assert float(batch_nuclear_norm(torch.zeros(4, 4))) == pytest.approx(0.25)


def test_nuclear_norm_has_finite_gradients_where_rows_repeat() -> None:
    z = torch.zeros(4, 3, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(batch_nuclear_norm(z), z)[0]).all()


def test_classifier_discrepancy() -> None:
    expected = np.abs(softmax(Z) - softmax(W)).mean(1)
    assert np.allclose(classifier_discrepancy(tensor(Z), tensor(W)).detach().numpy(), expected)


def test_log_not_stays_exact_and_bounded_where_one_minus_p_underflows() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = np.log(1 - softmax(Z)[np.arange(6), labels.numpy()])
    assert np.allclose(log_not(tensor(Z), labels).detach().numpy(), expected)
    z = torch.tensor([[60.0, 0.0]], requires_grad=True)
    loss = -log_not(z, torch.tensor([0]))
    assert float(loss) == pytest.approx(60.0)
    assert torch.allclose(torch.autograd.grad(loss, z)[0], torch.tensor([[1.0, -1.0]]))


def test_spectral_penalty() -> None:
    s = np.linalg.svd(Z, compute_uv=False)
    assert float(spectral_penalty(tensor(Z), 2)) == pytest.approx((s[:2] ** 2).sum())
    assert float(spectral_penalty(tensor(Z), 99)) == pytest.approx((Z**2).sum())
    assert spectral_penalty(torch.zeros(0, 4)) == 0


def test_stepwise_norm_pushes_every_row_outwards_by_twice_the_step() -> None:
    x = tensor(Z)
    values = stepwise_norm(x, 0.5)
    assert np.allclose(values.detach().numpy(), 0.25)
    gradient = torch.autograd.grad(values.sum(), x)[0].numpy()
    assert np.allclose(gradient, -2 * 0.5 * Z / np.linalg.norm(Z, axis=1, keepdims=True))
    zero = torch.zeros(1, 3, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(stepwise_norm(zero).sum(), zero)[0]).all()


@pytest.mark.parametrize(
    "function",
    [
        entropy,
        batch_nuclear_norm,
        lambda z: classifier_discrepancy(z, torch.tensor(W)),
        lambda z: log_not(z, torch.tensor([0, 1, 2, 3, 0, 1])),
        lambda z: spectral_penalty(z, 1),
    ],
)
def test_gradients(function) -> None:
    assert torch.autograd.gradcheck(function, (tensor(Z),))
