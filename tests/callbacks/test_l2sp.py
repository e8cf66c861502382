import torch
from torch import nn

from crossft.callbacks.retention.l2sp import L2SPPenalty


def penalty() -> tuple[nn.Linear, nn.Linear, L2SPPenalty]:
    torch.manual_seed(0)
    shared, own = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    term = L2SPPenalty(list(shared.parameters()), list(own.parameters()), ratio=0.5)
    with torch.no_grad():
        for p in shared.parameters():
            p.add_(torch.randn_like(p))
    return shared, own, term


def test_value_and_gradient_equal_autograd_of_eq_2() -> None:
    shared, own, term = penalty()
    anchors = list(term.buffers())
    distance = sum(((p - a) ** 2).sum() for p, a in zip(shared.parameters(), anchors, strict=True))
    eq2 = 0.5 * distance + 0.5 * 0.5 * sum((p**2).sum() for p in own.parameters())
    assert torch.allclose(term.value().double(), eq2, rtol=1e-6)
    expected = torch.autograd.grad(0.7 * eq2, [*shared.parameters(), *own.parameters()])
    term.add_grad_(0.7)
    for p, g in zip([*shared.parameters(), *own.parameters()], expected, strict=True):
        assert torch.allclose(p.grad, g)


def test_it_adds_to_the_gradient_that_is_there() -> None:
    shared, _, term = penalty()
    shared.weight.grad = torch.ones_like(shared.weight)
    term.add_grad_(2.0)
    assert torch.allclose(shared.weight.grad, 1 + 2 * (shared.weight - term.anchor_0))


def test_frozen_parameters_are_left_alone() -> None:
    shared, _, term = penalty()
    shared.weight.requires_grad_(False)
    full = term.value()
    term.add_grad_(1.0)
    assert shared.weight.grad is None
    assert shared.bias.grad is not None
    shared.weight.requires_grad_(True)
    assert term.value() > full


def test_at_the_start_it_pulls_nowhere() -> None:
    shared = nn.Linear(3, 2)
    term = L2SPPenalty(list(shared.parameters()), [], ratio=0.1)
    assert term.value() == 0
    term.add_grad_(5.0)
    assert all((p.grad == 0).all() for p in shared.parameters())


def test_two_bowls_have_their_minimum_between() -> None:
    """min 1/2 (w - b)^2 + alpha/2 (w - a)^2 lies at (b + alpha a) / (1 + alpha)."""
    w = nn.Parameter(torch.tensor([1.0]))
    term = L2SPPenalty([w], [], 0.0)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (w - 4.0) ** 2).sum().backward()
        term.add_grad_(0.5)
        optimizer.step()
    assert torch.allclose(w.detach(), torch.tensor([(4.0 + 0.5 * 1.0) / 1.5]), atol=1e-5)
