"""MCC, BNM, entropy, BSP and AFN as terms: which rows they read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import built, make_step, make_task

from crossft.callbacks.adaptation import AFN, BNM, BSP, MCC, EntropyMinimization
from crossft.errors import ConfigError
from crossft.functional import batch_nuclear_norm, minimum_class_confusion
from crossft.types import Domain

DOMAINS = [1, 0, -1, 0, 1, 0, 0, 1]  # four source rows, three target rows, a padding row between
SOURCE, TARGET = [1, 3, 5, 6], [0, 4, 7]
ALL = [MCC(), BNM(), EntropyMinimization(), BSP(), AFN(), AFN(variant="hard")]


def names(method) -> str:
    return type(method).__name__ + getattr(method, "variant", "")


def rows(d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (MCC(temperature=2.0), lambda t: minimum_class_confusion(t, 2.0)),
        (BNM(), lambda t: -batch_nuclear_norm(t)),
        (EntropyMinimization(), lambda t: -(t.softmax(1) * t.log_softmax(1)).sum(1).mean()),
    ],
    ids=["mcc", "bnm", "entropy"],
)
def test_target_rows_alone_are_read(method, reference) -> None:
    z = rows(3)
    loss = built(method)(make_step(rows(), DOMAINS, logits=z), make_task())
    assert torch.allclose(loss, reference(z[TARGET]))
    gradient = torch.autograd.grad(loss, z)[0]
    assert (gradient[[2, *SOURCE]] == 0).all()
    assert (gradient[TARGET] != 0).any(1).all()


def test_entropy_leaves_out_rows_that_have_a_label() -> None:
    z = rows(3)
    targets = [1, 0, -1, 0, -1, 0, 0, -1]  # the first target row has a label
    loss = built(EntropyMinimization())(make_step(rows(), DOMAINS, logits=z, targets=targets), make_task())
    h = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    assert torch.allclose(loss, (h[4] + h[7]) / 3)


def test_bsp_adds_the_largest_squared_singular_values_of_both_sides() -> None:
    x = rows()
    loss = built(BSP(k=2))(make_step(x, DOMAINS), make_task())
    parts = [np.linalg.svd(x.detach().numpy()[i], compute_uv=False)[:2] for i in (SOURCE, TARGET)]
    assert float(loss.detach()) == pytest.approx(sum((s**2).sum() for s in parts))


def test_safn_lets_the_norms_of_both_sides_grow() -> None:
    x = rows()
    term = built(AFN(step=0.3))
    loss = term(make_step(x, DOMAINS), make_task())
    assert float(loss) == pytest.approx(2 * 0.3**2)
    gradient = torch.autograd.grad(loss, x)[0]
    unit = (x / x.norm(dim=1, keepdim=True)).detach()
    expected = torch.zeros_like(gradient)
    expected[SOURCE], expected[TARGET] = -2 * 0.3 * unit[SOURCE] / 4, -2 * 0.3 * unit[TARGET] / 3
    assert torch.allclose(gradient, expected)
    assert float(term.logs()["norm_target"]) == pytest.approx(float(x[TARGET].norm(dim=1).mean()))


def test_hafn_brings_the_mean_norms_to_the_radius() -> None:
    x = rows()
    loss = built(AFN(variant="hard", radius=5.0))(make_step(x, DOMAINS), make_task())
    n = x.norm(dim=1)
    expected = (n[SOURCE].mean() - 5) ** 2 + (n[TARGET].mean() - 5) ** 2
    assert torch.allclose(loss, expected)
    assert torch.allclose(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("domains", [[0] * 8, [-1] * 8])
def test_an_absent_target_leaves_finite_gradients(method, domains: list[int]) -> None:
    x, z = rows(), rows(3, 1)
    loss = built(method)(make_step(x, domains, logits=z, quota=(7.0, 1.0)), make_task())
    assert torch.isfinite(loss)
    grads = [g for g in torch.autograd.grad(loss, (x, z), allow_unused=True) if g is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    if domains[0] == -1 or not isinstance(method, BSP | AFN):
        assert loss == 0
        assert all((g == 0).all() for g in grads)


def test_a_target_space_of_its_own_is_read_with_its_own_head() -> None:
    task = make_task()
    task.domains = (task.domains[0], Domain("sketch", "target", labels=("x", "y")))
    task.head_keys = {"photo": "photo", "sketch": "sketch"}
    assert MCC().build(task).head == "sketch"


def test_regression_is_refused() -> None:
    task = make_task()
    task.domains = tuple(Domain(d.name, d.role, "regression", ("y",)) for d in task.domains)
    with pytest.raises(ConfigError, match=r"methods\.bnm reads class probabilities; domain 'sketch' has regression"):
        BNM().build(task)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCC(temperature=0.0), r"temperature=0\.0"),
        (lambda: BSP(k=0), "k=0"),
        (lambda: AFN(variant="soft"), "allowed: stepwise, hard"),
        (lambda: AFN(step=0.0), r"step=0\.0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
