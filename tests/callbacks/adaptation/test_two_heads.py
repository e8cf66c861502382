"""MDD and MCD: a second head that plays against the features."""

from __future__ import annotations

import math

import pytest
import torch
from steps import built, make_step, make_task, model_of
from torch import nn
from torch.nn import functional as F

from crossft.callbacks.adaptation import MCD, MDD
from crossft.errors import ConfigError

DOMAINS = [1, 0, -1, 0, 1, 0, 0, 1]
SOURCE, TARGET = [1, 3, 5, 6], [0, 4, 7]
TARGETS = [-1, 2, -1, 0, -1, 1, 1, -1]
RAMP = 2 / (1 + math.exp(-5)) - 1  # lambda at half of the training


def rows(d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_mdd_is_the_combined_cross_entropy_of_the_paper() -> None:
    x, z = rows(), rows(3, 1)
    term = built(MDD(hidden=5, margin=4.0))
    loss = term(make_step(x, DOMAINS, logits=z), make_task())
    predicted = z.argmax(1)
    p = term.adversary(x).softmax(1)
    own = p[torch.arange(8), predicted]
    plain = 4.0 * -own[SOURCE].log().mean() - (1 - own[TARGET]).log().mean()
    assert torch.allclose(loss, plain)
    ours = torch.autograd.grad(loss, [x, *term.parameters()], retain_graph=True)
    expected = torch.autograd.grad(plain, [x, *term.parameters()])
    assert torch.allclose(ours[0], -0.1 * RAMP * expected[0])
    assert all(torch.allclose(a, b) for a, b in zip(ours[1:], expected[1:], strict=True))
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None


def test_mdd_logs_where_both_heads_agree() -> None:
    x, z = rows(), rows(3, 1)
    term = built(MDD(hidden=5))
    term(make_step(x, DOMAINS, logits=z), make_task())
    same = (term.adversary(x).argmax(1) == z.argmax(1)).double()
    assert float(term.logs()["agreement_source"]) == pytest.approx(float(same[SOURCE].mean()))
    assert float(term.logs()["agreement_target"]) == pytest.approx(float(same[TARGET].mean()))


def test_mcd_is_supervised_second_head_minus_discrepancy() -> None:
    x = rows()
    head = nn.Linear(12, 3).double()
    model = model_of(head)
    term = built(MCD(), make_task())
    step = make_step(x, DOMAINS, logits=head(x), targets=TARGETS)
    loss = term(step, model)
    second = term.second
    supervised = F.cross_entropy(second(x)[SOURCE], torch.tensor(TARGETS)[SOURCE])
    discrepancy = (head(x).softmax(1) - second(x).softmax(1)).abs().mean(1)[TARGET].mean()
    assert torch.allclose(loss, supervised - discrepancy)
    assert float(term.logs()["discrepancy"]) == pytest.approx(float(discrepancy))
    ours = torch.autograd.grad(loss, [x, *head.parameters(), *second.parameters()])
    heads = torch.autograd.grad(supervised - discrepancy, [*head.parameters(), *second.parameters()], retain_graph=True)
    assert all(torch.allclose(a, b) for a, b in zip(ours[1:], heads, strict=True))  # heads: discrepancy grows
    features = torch.autograd.grad(supervised + RAMP * discrepancy, x)[0]
    assert torch.allclose(ours[0], features)  # features: it shrinks


def test_the_second_head_starts_elsewhere_and_its_dropout_moves_no_other_draw() -> None:
    task = make_task(head_dropout=0.5).double()
    term = built(MCD(), task)
    assert not torch.equal(term.second[1].weight, task.heads["photo"][1].weight)
    x = rows()
    step = make_step(x, DOMAINS, logits=task.heads["photo"](x), targets=TARGETS)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    term(step, task)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("method", [MDD(hidden=3), MCD()])
def test_absent_domains_touch_every_parameter_with_zero(method) -> None:
    task = make_task().double()
    term = built(method, task)
    x = rows()
    step = make_step(x, [-1] * 8, logits=task.heads["photo"](x), quota=(4.0, 4.0))
    loss = term(step, task)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(term.parameters())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MDD(margin=0.0), r"margin=0\.0"),
        (lambda: MDD(strength=-1.0), r"strength=-1\.0"),
        (lambda: MDD(hidden=0), "hidden=0"),
        (lambda: MCD(strength=-0.1), r"strength=-0\.1"),
        (
            lambda: MDD().build(make_task(labels=("one",))),
            r"methods\.mdd needs two classes or more; head 'photo' has 1",
        ),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
