"""GroupDRO, VREx, IRM and Fishr: task loss + weight * term is the published objective."""

from __future__ import annotations

import pytest
import torch
from steps import built, make_step, make_task
from torch import nn
from torch.nn import functional as F

from crossft.callbacks.adaptation import IRM, Fishr, GroupDRO, VREx
from crossft.errors import ConfigError

ROLES = ("source", "source", "source")
DOMAINS = [0, 1, 2, 0, -1, 1, 2, 0, 1, 2]
TARGETS = [0, 1, 2, 0, -1, 1, 2, 2, 1, 0]
GROUPS = [[i for i, d in enumerate(DOMAINS) if d == g] for g in range(3)]
ALL = [GroupDRO(), VREx(), IRM(), IRM(unbiased=False), Fishr(anneal=0.0)]


def rows(d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(10, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def step_of(x: torch.Tensor, z: torch.Tensor, progress: float = 1.0, number: int = 0, targets=TARGETS):
    return make_step(x, DOMAINS, ROLES, logits=z, targets=targets, progress=progress, step=number)


def objective(method, z: torch.Tensor, term=None, **kwargs) -> torch.Tensor:
    """Task loss plus weighted term, as the task adds them."""
    task = make_task(ROLES)
    step = step_of(rows(), z, **kwargs)
    task_loss = step.per_sample_loss.sum() / step.batch.labeled_quota
    return task_loss + method.weight * (term or built(method, task))(step, task)


def risks(z: torch.Tensor) -> torch.Tensor:
    y = torch.tensor(TARGETS)
    return torch.stack([F.cross_entropy(z[g], y[g]) for g in GROUPS])


def same(ours: torch.Tensor, z: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.allclose(ours, theirs)
    one = torch.autograd.grad(ours, z, retain_graph=True)[0]
    assert torch.allclose(one, torch.autograd.grad(theirs, z)[0])
    assert (one[4] == 0).all()  # the padding row


def test_groupdro_is_the_weighted_sum_of_the_risks() -> None:
    z = rows(3, 1)
    method = GroupDRO(eta=0.5)
    term = built(method, make_task(ROLES))
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    for number in range(3):
        q = q * torch.exp(0.5 * risks(z).detach())
        q = q / q.sum()
        same(objective(method, z, term, number=number), z, (q * risks(z)).sum())
        assert torch.allclose(torch.stack(list(term.logs().values())), q)


def test_groupdro_moves_once_an_optimizer_step() -> None:
    z = rows(3, 1)
    method = GroupDRO(eta=0.5)
    once, twice = built(method, make_task(ROLES)), built(method, make_task(ROLES))
    for number in range(3):
        one = objective(method, z, once, number=number)
        objective(method, z, twice, number=number)
        two = objective(method, z, twice, number=number)  # the second micro-batch, with the same rows
        assert torch.allclose(one, two)


def test_groupdro_leaves_labeled_rows_of_other_domains_to_the_task() -> None:
    roles = ("source", "source", "target")
    z = rows(3, 1)
    task = make_task(roles)
    step = make_step(rows(), DOMAINS, roles, logits=z, targets=TARGETS)
    term = built(GroupDRO(eta=0.0), task)
    task_loss = step.per_sample_loss.sum() / 9
    assert torch.allclose(task_loss + term(step, task), risks(z)[:2].mean() * 6 / 9 + risks(z)[2] * 3 / 9)


def test_vrex_is_mean_plus_beta_variance() -> None:
    z = rows(3, 1)
    r = risks(z)
    same(objective(VREx(weight=7.0), z), z, r.mean() + 7.0 * ((r - r.mean()) ** 2).mean())


def test_irm_is_mean_plus_lambda_squared_gradient() -> None:
    z = rows(3, 1)
    y = torch.tensor(TARGETS)
    penalties = []
    for g in GROUPS:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        penalties.append(torch.autograd.grad(F.cross_entropy(w * z[g], y[g]), w, create_graph=True)[0] ** 2)
    same(objective(IRM(weight=5.0, unbiased=False), z), z, risks(z).mean() + 5.0 * torch.stack(penalties).mean())


def test_unbiased_irm_averages_products_of_different_rows() -> None:
    z = rows(3, 1)
    y = torch.tensor(TARGETS)
    penalties = []
    for group in GROUPS:
        each = []
        for i in group:
            w = torch.ones((), dtype=torch.float64, requires_grad=True)
            each.append(torch.autograd.grad(F.cross_entropy(w * z[[i]], y[[i]]), w, create_graph=True)[0])
        products = [each[i] * each[j] for i in range(3) for j in range(3) if i != j]
        penalties.append(torch.stack(products).mean())
    same(objective(IRM(weight=5.0), z), z, risks(z).mean() + 5.0 * torch.stack(penalties).mean())


@pytest.mark.parametrize("method", [VREx(weight=50.0, anneal=0.4), IRM(weight=50.0, anneal=0.4)])
def test_the_factor_is_one_at_first(method) -> None:
    z = rows(3, 1)
    task_loss = risks(z).mean()
    early, late = (objective(method, z, progress=p) - task_loss for p in (0.39, 0.4))
    assert torch.allclose(50.0 * early, late)


def variances_of(head: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """Variance over each domain's rows of the gradient by weight and bias, row by row."""
    y = torch.tensor(TARGETS)
    found = []
    for group in GROUPS:
        each = []
        for i in group:
            grads = torch.autograd.grad(
                F.cross_entropy(head(x[[i]]), y[[i]]), list(head.parameters()), create_graph=True
            )
            each.append(torch.cat([g.flatten() for g in grads]))
        found.append(torch.stack(each).var(0, correction=0))
    return found


def test_fishr_matches_running_gradient_variances() -> None:
    head = nn.Linear(12, 3).double()
    method = Fishr(weight=2.0, ema=0.6, anneal=0.0)
    task = make_task(ROLES)
    term = built(method, task)
    kept = [torch.zeros(39).double() for _ in range(3)]
    for number in range(3):
        x = rows(seed=number)
        value = term(step_of(x, head(x), number=number), task)
        now = variances_of(head, x)
        smoothed = [(0.6 * k + 0.4 * v) / 0.4 for k, v in zip(kept, now, strict=True)]
        mean = torch.stack(smoothed).mean(0)
        expected = sum(((s - mean) ** 2).mean() for s in smoothed) / 3
        assert torch.allclose(value, expected)
        for wrt in (x, head.weight):
            one, two = (torch.autograd.grad(v, wrt, retain_graph=True)[0] for v in (value, expected))
            assert torch.allclose(one, two, atol=1e-12)
        kept = [(0.6 * k + 0.4 * v).detach() for k, v in zip(kept, now, strict=True)]


def test_fishr_waits_and_keeps_its_averages_meanwhile() -> None:
    head = nn.Linear(12, 3).double()
    task = make_task(ROLES)
    term = built(Fishr(anneal=0.5), task)
    for number, progress in enumerate((0.0, 0.49)):
        x = rows(seed=number)
        assert term(step_of(x, head(x), progress, number), task) == 0
    assert (term.average != 0).any()


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_unlabeled_and_absent_rows_give_zero(method) -> None:
    task = make_task(ROLES)
    z = rows(3, 1)
    step = make_step(z, [-1] * 10, ROLES, logits=z, quota=(0.0, 0.0, 0.0))
    term = built(Fishr(anneal=0.0) if isinstance(method, Fishr) else method, task)
    if isinstance(method, Fishr):
        step.features = torch.zeros(10, 12, dtype=torch.float64)
    loss = term(step, task)
    assert loss == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_fewer_than_two_sources_are_refused(method) -> None:
    with pytest.raises(ConfigError, match=r"methods\.\w+ compares source domains and the run has 1"):
        method.build(make_task())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupDRO(eta=-1.0), r"eta=-1\.0"),
        (lambda: VREx(anneal=2.0), r"anneal=2\.0"),
        (lambda: IRM(anneal=-0.1), r"anneal=-0\.1"),
        (lambda: Fishr(ema=1.0), r"ema=1\.0"),
        (lambda: Fishr().build(make_task(ROLES, head_dropout=0.1)), r"model\.head_dropout=0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
