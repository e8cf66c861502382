"""Domain-generalization math against autograd of the definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crossft.functional import (
    gradient_variance,
    logit_gradients,
    scale_gradients,
    square_of_mean,
    update_group_weights,
)

G = torch.Generator().manual_seed(0)
Z = torch.randn(6, 4, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0, 1])
H = torch.randn(6, 5, generator=G, dtype=torch.float64)


def test_scale_gradients_are_those_of_a_factor_on_the_logits() -> None:
    z = Z.clone().requires_grad_()
    ours = scale_gradients(F.cross_entropy(z, Y, reduction="none"), z)
    for i in range(6):
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(w * Z[i : i + 1], Y[i : i + 1])
        assert torch.allclose(ours[i], torch.autograd.grad(loss, w)[0])


def test_the_penalty_has_the_gradient_of_irmv1() -> None:
    z = Z.clone().requires_grad_()
    penalty = square_of_mean(scale_gradients(F.cross_entropy(z, Y, reduction="none"), z), unbiased=False)
    other = Z.clone().requires_grad_()
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    direct = torch.autograd.grad(F.cross_entropy(w * other, Y), w, create_graph=True)[0] ** 2
    assert torch.allclose(penalty, direct)
    assert torch.allclose(torch.autograd.grad(penalty, z)[0], torch.autograd.grad(direct, other)[0])


def test_the_unbiased_square_is_the_mean_over_pairs() -> None:
    v = Z[:, 0]
    pairs = [v[i] * v[j] for i in range(6) for j in range(6) if i != j]
    assert torch.allclose(square_of_mean(v), torch.stack(pairs).mean())
    draws = torch.randn(20000, 4, generator=G) + 0.3
    estimates = torch.stack([square_of_mean(d) for d in draws[:4000]])
    assert float(estimates.mean()) == pytest.approx(0.09, abs=3 * float(estimates.std()) / 4000**0.5)
    assert square_of_mean(v[:1]) == 0
    assert square_of_mean(v[:0], unbiased=False) == 0


def test_gradient_variance_is_that_of_the_gradients_of_a_linear_layer() -> None:
    layer = torch.nn.Linear(5, 4).double()
    each = []
    for i in range(6):
        loss = F.cross_entropy(layer(H[i : i + 1]), Y[i : i + 1])
        weight, bias = torch.autograd.grad(loss, list(layer.parameters()))
        each.append(torch.cat([weight.flatten(), bias]))
    z = layer(H)
    g = logit_gradients(F.cross_entropy(z, Y, reduction="none"), z)
    assert torch.allclose(gradient_variance(g, H), torch.stack(each).var(0, correction=0))


def test_gradient_variance_has_a_gradient() -> None:
    h = H[:3, :2].clone().requires_grad_()
    layer = torch.nn.Linear(2, 4).double()

    def variance(h: torch.Tensor) -> torch.Tensor:
        z = layer(h)
        return gradient_variance(logit_gradients(F.cross_entropy(z, Y[:3], reduction="none"), z), h)

    assert torch.autograd.gradcheck(variance, (h,))


def test_group_weights_are_an_exponentiated_step() -> None:
    q, losses = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    expected = q * torch.exp(0.7 * losses)
    assert torch.allclose(update_group_weights(q, losses, 0.7), expected / expected.sum())
