"""MMD, JAN, CORAL and CMD as terms: which rows, which layers, which pairs of domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import built, make_step, make_task

from crossft.callbacks.adaptation import CMD, CORAL, JAN, MMD
from crossft.errors import ConfigError, StageError

ALL = [MMD(), MMD(estimator="linear"), JAN(), JAN(estimator="linear"), CORAL(), CMD()]
DOMAINS = [1, 0, -1, 0, 1, 0, 0, 1]  # four source rows, three target rows, a padding row between


def rows(d: int = 12, seed: int = 0, n: int = 8) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def kernel(a: torch.Tensor, b: torch.Tensor, scale: float, factors=(0.25, 0.5, 1.0, 2.0, 4.0)) -> torch.Tensor:
    return sum(torch.exp(-((a - b) ** 2).sum() / (u * scale)) for u in factors)


def unbiased(k, s: list[int], t: list[int]) -> float:
    """Equation 3 of Gretton et al. for a kernel of two row numbers."""
    m, n = len(s), len(t)
    within = sum(k(i, j) for i in s for j in s if i != j) / (m * (m - 1))
    within += sum(k(i, j) for i in t for j in t if i != j) / (n * (n - 1))
    return float(within - 2 * sum(k(i, j) for i in s for j in t) / (m * n))


def mean_distance(x: torch.Tensor, which: list[int]) -> float:
    pairs = [(i, j) for i in which for j in which if i != j]
    return float(sum(((x[i] - x[j]) ** 2).sum().detach() for i, j in pairs) / len(pairs))


SOURCE, TARGET = [1, 3, 5, 6], [0, 4, 7]


def test_mmd_reads_source_and_target_rows_alone() -> None:
    x = rows()
    loss = built(MMD())(make_step(x, DOMAINS), make_task())
    scale = mean_distance(x, SOURCE + TARGET)
    assert float(loss) == pytest.approx(unbiased(lambda i, j: kernel(x[i], x[j], scale), SOURCE, TARGET))
    gradient = torch.autograd.grad(loss, x)[0]
    assert (gradient[2] == 0).all()
    assert (gradient[[*SOURCE, *TARGET]] != 0).any(1).all()


def test_layers_add_up_in_mmd_and_multiply_in_jan() -> None:
    x, z = rows(), rows(3, 1)
    step = make_step(x, DOMAINS, logits=z)
    p = torch.softmax(z, 1)
    one = mean_distance(x, SOURCE + TARGET)
    two = mean_distance(p, SOURCE + TARGET)
    summed = built(MMD(layers=("features", "probabilities")))(step, make_task())
    parts = [
        unbiased(lambda i, j: kernel(x[i], x[j], one), SOURCE, TARGET),
        unbiased(lambda i, j: kernel(p[i], p[j], two), SOURCE, TARGET),
    ]
    assert float(summed) == pytest.approx(sum(parts))
    joint = built(JAN())(step, make_task())
    expected = unbiased(lambda i, j: kernel(x[i], x[j], one) * kernel(p[i], p[j], 1.68, (1.0,)), SOURCE, TARGET)
    assert float(joint) == pytest.approx(expected)


def test_coral_is_on_logits_and_cmd_on_squashed_features() -> None:
    x, z = rows(), rows(3, 1)
    step = make_step(x, DOMAINS, logits=z)
    a, b = (z.detach().numpy()[i] for i in (SOURCE, TARGET))
    expected = ((np.cov(a.T) - np.cov(b.T)) ** 2).sum() / (4 * 9)
    assert float(built(CORAL())(step, make_task())) == pytest.approx(expected)
    for squash, function, width in (("sigmoid", lambda v: 1 / (1 + np.exp(-v)), 1.0), ("tanh", np.tanh, 2.0)):
        a, b = (function(x.detach().numpy()[i]) for i in (SOURCE, TARGET))
        expected = np.linalg.norm(a.mean(0) - b.mean(0)) / width
        expected += np.linalg.norm(a.var(0) - b.var(0)) / width**2
        loss = built(CMD(moments=2, squash=squash))(step, make_task())
        assert float(loss) == pytest.approx(expected)


def test_between_pairs_and_sources_average_over_pairs_of_domains() -> None:
    task = make_task(("source", "source", "target", "target"))
    domains = [0, 0, 1, 1, 2, 2, 3, 3]
    x = rows()
    step = make_step(x, domains, ("source", "source", "target", "target"))

    def loss(between: str) -> float:
        return float(CORAL(layers=("features",), between=between).build(task)(step, task))

    def direct(one: list[int], two: list[int]) -> float:
        a, b = (x.detach().numpy()[i] for i in (one, two))
        return ((np.cov(a.T) - np.cov(b.T)) ** 2).sum() / (4 * 144)

    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert loss("sources") == pytest.approx(direct(groups[0], groups[1]))
    assert loss("pairs") == pytest.approx(np.mean([direct(a, b) for a in groups[:2] for b in groups[2:]]))
    assert loss("roles") == pytest.approx(direct([0, 1, 2, 3], [4, 5, 6, 7]))


def test_between_sources_asks_for_no_target() -> None:
    assert [CORAL(between=b).needs_target for b in ("roles", "pairs", "sources")] == ["unlabeled", "unlabeled", "none"]
    with pytest.raises(ConfigError, match=r"the run has 1; name two or more in data\.source"):
        MMD(between="sources").build(make_task())


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_an_absent_or_single_row_domain_gives_zero_and_finite_gradients(method) -> None:
    term = built(method)
    for domains in ([0] * 8, [-1] * 8, [0] * 7 + [1]):
        x, z = rows(), rows(3, 1)
        loss = term(make_step(x, domains, logits=z, quota=(7.0, 1.0)), make_task())
        grads = torch.autograd.grad(loss, (x, z), allow_unused=True)
        assert all(torch.isfinite(g).all() for g in grads if g is not None)
        if domains[-1] != 1 or not isinstance(method, CMD):
            assert loss == 0


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_the_order_of_rows_does_not_matter(method) -> None:
    x, z = rows(), rows(3, 1)
    step = make_step(x, DOMAINS, logits=z)
    turned = make_step(x.flip(0), DOMAINS[::-1], logits=z.flip(0))
    turned.batch.sample_ids = step.batch.sample_ids.flip(0)
    term = built(method)
    assert float(term(step, make_task())) == pytest.approx(float(term(turned, make_task())), rel=1e-12)


def test_a_stage_is_read_where_it_is_named() -> None:
    method = CMD(layers=("middle", "features"))
    term = method.build(make_task())
    assert term.needs_stages == ("middle",)
    x, stage = rows(), torch.rand(8, 6, dtype=torch.float64)
    both = term(make_step(x, DOMAINS, stages={"middle": stage}), make_task())
    alone = CMD().build(make_task())(make_step(x, DOMAINS), make_task())
    middle = CMD().build(make_task())(make_step(stage, DOMAINS), make_task())
    assert float(both) == pytest.approx(float(alone + middle))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MMD(bandwidths=()), ConfigError, "bandwidths="),
        (lambda: MMD(bandwidths=(1.0, -1.0)), ConfigError, "positive factors"),
        (lambda: MMD(estimator="biased"), ConfigError, "allowed: unbiased, linear"),
        (lambda: MMD(layers=()), ConfigError, "layers=\\(\\) is empty"),
        (lambda: JAN(layers=("features",)), ConfigError, "for one, use MMD"),
        (lambda: JAN(estimator="x"), ConfigError, "allowed: unbiased, linear"),
        (lambda: JAN(bandwidths=(0.0,)), ConfigError, "positive factors"),
        (lambda: CMD(moments=0), ConfigError, "moments=0"),
        (lambda: CMD(squash="relu"), ConfigError, "allowed: sigmoid, tanh, none"),
        (lambda: CORAL(between="all"), ConfigError, "allowed: roles, pairs, sources"),
        (lambda: CORAL(layers=("fc8",)).build(make_task()), StageError, "layer 'fc8' is unknown"),
    ],
)
def test_bad_settings_are_named(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
