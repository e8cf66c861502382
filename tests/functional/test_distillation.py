from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crossft.functional.distillation import distillation, feature_distance, symmetric_kl


def pair(k: int = 4, b: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(b, k, generator=g, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_torch_kl_times_t_squared(temperature: float) -> None:
    s, t = pair()
    p, q = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    expected = temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)
    assert torch.allclose(distillation(s, t, temperature), expected)
    assert torch.autograd.gradcheck(lambda x: distillation(x, t, temperature), s)


def test_its_gradient_is_that_of_the_cross_entropy_and_does_not_fade_with_temperature() -> None:
    s, t = pair()
    ours = torch.autograd.grad(distillation(s, t, 2.0).sum(), s)[0]
    cross = -4 * ((t / 2).softmax(1) * (s / 2).log_softmax(1)).sum()
    assert torch.allclose(ours, torch.autograd.grad(cross, s)[0])
    hot, hotter = (torch.autograd.grad(distillation(s, t, T).sum(), s)[0].norm() for T in (50.0, 500.0))
    assert hot == pytest.approx(float(hotter), rel=0.05)  # Hinton et al. 2015, eq. 4: T^2 keeps its size


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_it_is_zero_with_zero_gradient_where_the_two_agree(kind: str) -> None:
    s, t = pair()
    same = t.clone().requires_grad_()
    value = distillation(same, t, 2.0, kind)
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), same)[0].abs().max() < 1e-12
    assert (distillation(s, t, 2.0, kind) > 0).all()


def test_multilabel_is_the_mean_of_bernoulli_divergences() -> None:
    s, t = pair()
    p, q = (t / 2).sigmoid(), (s / 2).sigmoid()
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)
    assert torch.allclose(distillation(s, t, 2.0, "multilabel"), expected)


def test_feature_distance_leaves_masked_positions_out() -> None:
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.allclose(feature_distance(s, t), 0.5 * (s - t).pow(2).mean((1, 2)))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.stack([0.5 * (s - t)[0, :2].pow(2).mean(), 0.5 * (s - t)[1, :1].pow(2).mean()])
    assert torch.allclose(feature_distance(s, t, mask), expected)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_symmetric_kl_is_the_sum_of_both_divergences(kind: str) -> None:
    s, t = pair()
    both = distillation(s, t, 1.0, kind) + distillation(t, s.detach(), 1.0, kind)
    assert torch.allclose(symmetric_kl(s, t, kind), both)
    assert torch.autograd.gradcheck(lambda x: symmetric_kl(x, t, kind), s)
