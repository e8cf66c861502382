"""Importance on numbers: closed forms, independence of batching, and agreement with plain autograd."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.errors import ConfigError
from crossft.functional.importance import fisher_cotangents, mas_cotangents
from crossft.functional.per_sample import GradientPowers


class Rows(nn.Module):
    """A network as a function of a mapping of rows."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        return self.net(rows["x"])


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def measured(model: nn.Module, x: Tensor, chunk: int = 4, power: int = 2, **kwargs) -> dict[str, Tensor]:
    """Mean importance over the rows of x, in chunks."""
    powers = GradientPowers(model, named(model), power)
    targets, uniform = kwargs.pop("targets", None), kwargs.pop("uniform", None)
    for i in range(0, len(x), chunk):
        rows, part = {"x": x[i : i + chunk]}, slice(i, i + chunk)
        t = None if targets is None else targets[part]
        u = None if uniform is None else uniform[:, part]
        pull = partial(fisher_cotangents, targets=t, uniform=u, **kwargs)
        powers.add(rows, mas_cotangents if power == 1 else pull)
    return {n: s / len(x) for n, s in powers.sums.items()}


def by_hand(model: nn.Module, x: Tensor, loss, power: int = 2) -> dict[str, Tensor]:
    """Mean over rows of |gradient of the row's own loss|^power."""
    total = {n: torch.zeros_like(p) for n, p in named(model).items()}
    for i in range(len(x)):
        model.zero_grad()
        loss(model({"x": x[i : i + 1]}), i).backward()
        for n, p in named(model).items():
            total[n] += 0 if p.grad is None else p.grad.abs() ** power
    return {n: t / len(x) for n, t in total.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).abs().max() <= rtol * value.abs().max() + 1e-12, name


def linear(k: int = 3) -> tuple[Rows, Tensor]:
    torch.manual_seed(0)
    return Rows(nn.Linear(4, k)).eval(), torch.randn(9, 4)


def test_linear_softmax_has_the_closed_form() -> None:
    """F of W_cj is the mean of p_c (1 - p_c) x_j^2, of b_c the mean of p_c (1 - p_c)."""
    model, x = linear()
    p = model({"x": x}).softmax(1).detach()
    v = p * (1 - p)
    expected = {"net.0.weight": (v.unsqueeze(2) * x.square().unsqueeze(1)).mean(0), "net.0.bias": v.mean(0)}
    close(measured(model, x, labels="exact"), expected, 1e-5)


@pytest.mark.parametrize("logits", [[0.3, -1.0, 2.0, 0.0], [40.0, 0.0, -3.0, -60.0], [-200.0, 0.0, 200.0, 0.0]])
def test_the_exact_factor_is_the_covariance_of_the_labels(logits: list[float]) -> None:
    """C^T C = diag(p) - p p^T with one row less than classes, also where the softmax saturates."""
    z = torch.tensor([logits, logits[::-1]])
    c, p = fisher_cotangents(z).double(), z.double().softmax(1)
    assert c.shape == (3, 2, 4)
    expected = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    found = torch.einsum("rbi,rbj->bij", c, c)
    assert torch.isfinite(c).all()
    assert torch.allclose(found, expected, atol=2e-7, rtol=1e-4)
    one = z[:, :2] - z[:, 1:2]
    assert fisher_cotangents(one).shape == (1, 2, 2)


def test_independent_labels_and_regression_have_closed_forms() -> None:
    model, x = linear()
    p = model({"x": x}).sigmoid().detach()
    v = p * (1 - p)
    assert torch.allclose(measured(model, x, labels="exact", kind="multilabel")["net.0.bias"], v.mean(0), atol=1e-6)
    model, x = linear(1)
    found = measured(model, x, labels="exact", kind="regression")
    assert torch.allclose(found["net.0.weight"], x.square().mean(0, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("labels", ["exact", "empirical", "argmax", "sampled"])
def test_every_label_mode_is_the_mean_of_squared_gradients_of_its_log_likelihood(labels: str) -> None:
    model, x = linear()
    targets, u = torch.tensor([0, 1, 2] * 3), torch.rand(1, 9, 3)
    p = model({"x": x}).softmax(1).detach()
    drawn = (p.cumsum(1) < u[0, :, :1]).sum(1)
    chosen = {"empirical": targets, "argmax": p.argmax(1), "sampled": drawn}
    if labels == "exact":
        parts = [
            by_hand(model, x, lambda z, i, c=c: float(p[i, c]) ** 0.5 * F.cross_entropy(z, torch.tensor([c])))
            for c in range(3)
        ]
        expected = {n: sum(part[n] for part in parts) for n in parts[0]}
    else:
        expected = by_hand(model, x, lambda z, i: F.cross_entropy(z, chosen[labels][i : i + 1]))
    close(measured(model, x, labels=labels, targets=targets, uniform=u), expected)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_sampling_converges_to_the_expectation(kind: str) -> None:
    model, x = linear()
    exact = measured(model, x, labels="exact", kind=kind)
    draws = torch.rand(4000, 9, 3, generator=torch.Generator().manual_seed(1))
    few = measured(model, x, labels="sampled", kind=kind, uniform=draws[:40])
    many = measured(model, x, labels="sampled", kind=kind, uniform=draws)
    close(many, exact, 0.05)
    error = [sum(float((f[n] - exact[n]).square().sum()) for n in exact) for f in (few, many)]
    assert error[1] < error[0] / 10


def test_squaring_the_batch_mean_would_depend_on_the_batch() -> None:
    """The trap this module is for: the square of the mean gradient is far below the mean of the squares."""
    model, x = linear()
    targets = torch.tensor([0, 1, 2] * 3)
    right = measured(model, x, labels="empirical", targets=targets)["net.0.weight"]
    model.zero_grad()
    F.cross_entropy(model({"x": x}), targets).backward()
    assert model.net[0].weight.grad.square().sum() < 0.5 * right.sum()


class Everything(nn.Module):
    """Layers with and without a closed form: shared, in place, a bare parameter, broadcast position table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.position = nn.Embedding(16, 4)
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        h = F.relu(self.bn(self.conv(rows["x"])), inplace=True)
        h = self.grouped(self.depthwise(h)).flatten(2).transpose(1, 2)
        h = h + self.position(torch.arange(h.shape[1]).unsqueeze(0))
        h = h + self.words(rows["ids"]).mean(1, keepdim=True)
        h = self.norm(self.twice(torch.tanh(self.twice(h)))) * self.scale
        return self.head(h.mean(1))


def everything() -> tuple[Everything, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Everything()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval(), {"x": torch.randn(7, 3, 8, 8), "ids": torch.randint(0, 7, (7, 5))}


@pytest.mark.parametrize("power", [1, 2])
def test_closed_forms_equal_autograd_on_every_kind_of_layer(power: int) -> None:
    model, rows = everything()
    powers = GradientPowers(model, named(model), power)
    z = powers.outputs(rows)
    c = mas_cotangents(z) if power == 1 else fisher_cotangents(z)
    powers.add(rows, lambda _: c)
    assert powers.slow == {"scale", "unused.weight", "unused.bias"}
    close(powers.sums, powers._one_by_one(rows, c, named(model)))
    assert powers.sums["unused.weight"].abs().max() == 0


def test_chunks_ragged_batches_and_the_slow_ways_agree() -> None:
    model, rows = everything()
    reference = None
    for sizes in ([7], [1, 6], [3, 3, 1], [1] * 7):
        powers = GradientPowers(model, named(model))
        start = 0
        for size in sizes:
            part = {k: v[start : start + size] for k, v in rows.items()}
            powers.add(part, fisher_cotangents)
            start += size
        reference = reference or powers.sums
        close(powers.sums, reference)
    c = fisher_cotangents(powers.outputs(rows))
    close(powers._vectorized(rows, c, named(model)), reference)


def test_a_layer_that_is_not_what_it_inherits_is_found_out() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(2 * x, self.weight, self.bias)

    torch.manual_seed(0)
    model, x = Rows(Doubled(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval(), torch.randn(6, 4)
    powers = GradientPowers(model, named(model))
    c = fisher_cotangents(powers.outputs({"x": x}))
    powers.add({"x": x}, lambda _: c)
    assert powers.slow == {"net.0.weight"}
    close(powers.sums, powers._one_by_one({"x": x}, c, named(model)))


def test_what_cannot_be_vectorized_goes_row_by_row() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, rows: dict[str, Tensor]) -> Tensor:
            x = rows["x"] * self.gain
            return x if bool((x.sum() > 1e6).all()) else 2 * x

    model, x = Branches(), torch.randn(5, 3)
    powers = GradientPowers(model, named(model))
    c = fisher_cotangents(powers.outputs({"x": x}))
    powers.add({"x": x}, lambda _: c)
    close(powers.sums, powers._one_by_one({"x": x}, c, named(model)))


def test_it_leaves_modes_buffers_gradients_flags_and_generators_alone() -> None:
    model, rows = everything()
    model.conv.weight.requires_grad_(False)
    model.bn.weight.grad = torch.ones(6)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    powers = GradientPowers(model, named(model))
    powers.add(rows, fisher_cotangents)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["bn.weight"]
    assert (model.bn.weight.grad == 1).all()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert powers.sums["conv.weight"].max() > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Sums over a layer agree within 5 % (bfloat16) and 2 % (float16); gradients of 1e-5 do not vanish."""
    torch.manual_seed(0)
    model, x = Rows(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)).eval(), 1e-3 * torch.randn(64, 16)
    single = measured(model, x, 16, labels="exact")
    half = measured(copy.deepcopy(model).to(dtype), x.to(dtype), 16, labels="exact")
    for name, value in single.items():
        assert half[name].dtype == torch.float32
        assert abs(float(half[name].sum() / value.sum()) - 1) < tolerance, name


def test_bad_settings_are_named() -> None:
    z = torch.zeros(2, 1)
    with pytest.raises(ConfigError, match="labels='best'"):
        fisher_cotangents(z, labels="best")
    with pytest.raises(ConfigError, match="not defined for regression"):
        fisher_cotangents(z, "regression", "argmax")
    with pytest.raises(ConfigError, match="uniform"):
        fisher_cotangents(z, labels="sampled")
