"""DANN on any layer, CDAN and CDAN+E, against the equations written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from steps import built, make_step, make_task
from tiny import TinyVision
from torch.nn import functional as F

from crossft.callbacks.adaptation import CDAN, DANN
from crossft.callbacks.adaptation.features import Layer
from crossft.errors import ConfigError, StageError
from crossft.types import Domain

DOMAINS = [0, 0, 0, 1, -1]  # three source rows, one target row, one padding row


def rows(n: int = 5, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def balanced(losses: list[torch.Tensor]) -> torch.Tensor:
    """Mean over source rows and over target rows, each half; the padding row counts nowhere."""
    return sum(losses[:3]) / 6 + losses[3] / 2


def test_cdan_is_the_cross_entropy_on_the_outer_product() -> None:
    x, z = rows(), rows(d=3, seed=1)
    term = built(CDAN(hidden=4))
    loss = term(make_step(x, DOMAINS, logits=z, progress=0.5), make_task())
    strength = 2 / (1 + math.exp(-5)) - 1
    losses = []
    for i in range(5):
        g = torch.softmax(z[i].detach(), 0)
        joint = torch.stack([g[c] * x[i, j] for c in range(3) for j in range(12)])
        losses.append(F.cross_entropy(term.discriminator(joint)[None], torch.tensor([int(i == 3)])))
    expected = balanced(losses)
    assert torch.allclose(loss, expected, atol=1e-6)
    gradient = torch.autograd.grad(loss, x)[0]
    plain = torch.autograd.grad(expected, x)[0]
    assert torch.allclose(gradient, -strength * plain, atol=1e-6)
    assert (gradient[4] == 0).all()


def test_cdan_reads_predictions_without_moving_the_head() -> None:
    x, z = rows(), rows(d=3, seed=1)
    loss = built(CDAN(hidden=4))(make_step(x, DOMAINS, logits=z), make_task())
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None


def test_entropy_weighs_each_row_by_one_plus_exp_minus_entropy() -> None:
    x, z = rows(), 3 * rows(d=3, seed=1).detach()
    term = built(CDAN(hidden=4, entropy=True))
    loss = term(make_step(x, DOMAINS, logits=z), make_task())
    p = torch.softmax(z, 1)
    weights = [1 + math.exp(-sum(-q * math.log(q) for q in row)) for row in p.tolist()]
    joint = torch.einsum("bk,bd->bkd", p, x).flatten(1)
    plain = F.cross_entropy(term.discriminator(joint), torch.tensor([0, 0, 0, 1, 0]), reduction="none")
    assert torch.allclose(loss, balanced([w * v for w, v in zip(weights, plain, strict=True)]), atol=1e-6)


def test_the_randomized_map_estimates_the_inner_product_of_outer_products() -> None:
    """<T(f, g), T(f', g')> averages to <f, f'> <g, g'> (Long et al. 2018, theorem 1)."""
    term = built(CDAN(map="randomized", random_dim=200_000, hidden=1))
    f, g = rows(2).detach(), torch.softmax(rows(2, 3, seed=1).detach(), 1)
    joint = (f @ term.project_features) * (g @ term.project_predictions) / math.sqrt(200_000)
    expected = (f @ f.T) * (g @ g.T)
    assert torch.allclose(joint @ joint.T, expected, rtol=0.05, atol=0.1)
    assert term.constants == ("project_features", "project_predictions")


def test_the_randomized_term_is_its_discriminator_on_that_map() -> None:
    x, z = rows(), rows(d=3, seed=1)
    term = built(CDAN(map="randomized", random_dim=7, hidden=4))
    loss = term(make_step(x, DOMAINS, logits=z), make_task())
    g = torch.softmax(z.detach(), 1)
    joint = (x @ term.project_features) * (g @ term.project_predictions) / math.sqrt(7)
    plain = F.cross_entropy(term.discriminator(joint), torch.tensor([0, 0, 0, 1, 0]), reduction="none")
    assert torch.allclose(loss, balanced(list(plain)), atol=1e-6)


def test_auto_takes_the_randomized_map_above_4096() -> None:
    assert not CDAN().build(make_task()).randomized
    labels = tuple(f"c{i}" for i in range(342))  # 12 * 342 = 4104
    assert CDAN(random_dim=5).build(make_task(labels=labels)).randomized
    assert not CDAN(hidden=2).build(make_task(labels=labels[:341])).randomized


def test_an_absent_domain_still_touches_every_parameter() -> None:
    x, z = rows(), rows(d=3, seed=1)
    for method in (DANN(hidden=4), CDAN(hidden=4, entropy=True)):
        term = built(method)
        loss = term(make_step(x, [-1] * 5, logits=z, quota=(3.0, 1.0)), make_task())
        assert loss == 0
        grads = torch.autograd.grad(loss, list(term.parameters()))
        assert all((g == 0).all() for g in grads)


def test_multi_has_one_class_a_domain() -> None:
    task = make_task(("source", "source", "target"))
    x = rows()
    term = built(DANN(hidden=4, multi=True), task)
    loss = term(make_step(x, [0, 1, 1, 2, -1], task_roles(task)), task)
    plain = F.cross_entropy(term.discriminator(x), torch.tensor([0, 1, 1, 2, 0]), reduction="none")
    assert torch.allclose(loss, (plain[0] + plain[1:3].mean() + plain[3]) / 3, atol=1e-6)


def task_roles(task) -> tuple[str, ...]:
    return tuple(d.role for d in task.domains)


def test_tokens_are_judged_one_by_one_and_averaged_over_the_real_ones() -> None:
    tokens = torch.randn(5, 4, 1, dtype=torch.float64)
    tokens = torch.cat([tokens] * 12, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    term = built(DANN(hidden=4, tokens=True))
    loss = term(make_step(rows(), DOMAINS, tokens=tokens, mask=mask), make_task())
    losses = []
    for i in range(5):
        logits = term.discriminator(tokens[i, mask[i]])
        losses.append(F.cross_entropy(logits, torch.full((len(logits),), int(i == 3))))
    assert torch.allclose(loss, balanced(losses), atol=1e-6)


class Maps(TinyVision):
    """The first stage gives a map [b, 3, 2, 2], as a convolutional net's."""

    def _encode(self, start, value, inputs, capture):
        encoded = super()._encode(start, value, inputs, capture)
        if "stem" in encoded.stages:
            encoded.stages["stem"] = encoded.stages["stem"].view(-1, 3, 2, 2)
        return encoded


@pytest.mark.parametrize("tokens", [False, True])
def test_any_stage_can_be_read(tokens: bool) -> None:
    task = make_task(backbone=Maps(dropout=0.5))
    modes = [m.training for m in task.modules()]
    term = DANN(hidden=4, layer="stem", tokens=tokens).build(task).double()
    assert [m.training for m in task.modules()] == modes
    assert term.needs_stages == ("stem",)
    assert term.discriminator[0].in_features == 3
    stage = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    loss = term(make_step(rows(), DOMAINS, stages={"stem": stage}), task)
    flat = stage.flatten(2).transpose(1, 2)  # [b, positions, channels]
    labels = torch.tensor([0, 0, 0, 1, 0])
    if tokens:
        logits = term.discriminator(flat).transpose(1, 2)
        losses = F.cross_entropy(logits, labels[:, None].expand(5, 4), reduction="none").mean(1)
    else:
        losses = F.cross_entropy(term.discriminator(flat.mean(1)), labels, reduction="none")
    assert torch.allclose(loss, balanced(list(losses)), atol=1e-6)


def test_channels_last_maps_are_read_along_their_last_axis() -> None:
    stage = torch.randn(5, 2, 2, 3)
    step = make_step(torch.zeros(5, 12), DOMAINS, stages={"stem": stage})
    assert torch.equal(Layer("stem", channels_last=True).tokens(step)[0], stage.flatten(1, 2))
    assert torch.allclose(Layer("stem", channels_last=True).rows(step), stage.mean((1, 2)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CDAN(hidden=0), ConfigError, "hidden=0"),
        (lambda: CDAN(map="outer"), ConfigError, "map='outer' is unknown; allowed: auto, multilinear, randomized"),
        (lambda: CDAN(random_dim=0), ConfigError, "random_dim=0"),
        (lambda: DANN(layer="block9").build(make_task()), StageError, "layer 'block9' is unknown; allowed: features"),
    ],
)
def test_bad_settings_are_named(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_label_spaces_that_differ_are_refused() -> None:
    task = make_task()
    task.domains = (task.domains[0], Domain("sketch", "target", labels=("x",)))
    task.head_keys = {"photo": "photo", "sketch": "sketch"}
    with pytest.raises(ConfigError, match=r"methods.cdan needs one label space .* photo \(3 labels\), sketch \(1"):
        CDAN().build(task)
