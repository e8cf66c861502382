"""What every backbone keeps, over timm families and transformers architectures at tiny size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.tiny_models import CHAINS, TEXTS, WHOLES, images, noised, tiny_text, tiny_timm, tokens
from torch import Tensor, nn

from crossft.backbones import Backbone, batch_norms
from crossft.errors import StageError

SHARED_LAYERS = ("albert", "t5")
VISION = [*CHAINS, *WHOLES]
ALL = [*VISION, *TEXTS]
SPLIT = [*CHAINS, *(kind for kind in TEXTS if kind not in SHARED_LAYERS)]
Build = Callable[..., Backbone]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(name: str, **options: Any) -> Backbone:
        made = tiny_timm(name, **options) if name in VISION else tiny_text(name, tmp_path / name, **options)
        return noised(made)

    return make


def inputs_of(backbone: Backbone, rows: int = 3) -> dict[str, Tensor]:
    return images(backbone, rows) if hasattr(backbone.input_spec, "size") else tokens(rows)


@pytest.mark.parametrize("name", ALL)
def test_stages_partition_the_parameters(build: Build, name: str) -> None:
    net = build(name)
    owners = [[s.name for s in net.stages if any(p is q for q in s.parameters())] for p in net.parameters()]
    assert all(len(owner) == 1 for owner in owners)
    assert sum(len(s.parameters()) for s in net.stages) == len(list(net.parameters()))
    assert all(s.parameters() for s in net.stages)
    assert [net.stage_of(p).name for p in net.parameters()] == [owner[0] for owner in owners]
    assert len(net.stages) >= 2


@pytest.mark.parametrize("name", ALL)
def test_shapes(build: Build, name: str) -> None:
    net = build(name).eval()
    inputs = inputs_of(net)
    out = net(inputs)
    assert out.features.shape == (3, net.num_features)
    assert out.features.dtype == torch.float32
    assert out.stages == {}
    if name in TEXTS:
        assert out.tokens.shape == (3, 11, net.num_features)
        assert torch.equal(out.mask, inputs["attention_mask"].bool())
    elif name != "crossvit_9_240":  # two scales
        assert out.tokens.dim() == 3
        assert out.mask is None


@pytest.mark.parametrize("name", SPLIT)
def test_every_stage_can_be_the_first(build: Build, name: str) -> None:
    net = build(name).eval()
    inputs = inputs_of(net)
    names = [s.name for s in net.stages]
    with torch.no_grad():
        plain, full = net(inputs), net(inputs, names)
        assert set(full.stages) == set(names)
        torch.testing.assert_close(plain.features, full.features, atol=1e-6, rtol=0)
        rest = {"attention_mask": inputs["attention_mask"]} if name in TEXTS else {}
        for before, start in pairwise(names):
            assert net.can_start_from(start) is None
            part = net.forward_from(start, full.stages[before], rest, names[-1:])
            torch.testing.assert_close(part.features, full.features, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(part.tokens, full.tokens, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(part.stages[names[-1]], full.stages[names[-1]], atol=1e-5, rtol=1e-5)
        first = net.forward_from(names[0], torch.zeros(1), inputs)
    torch.testing.assert_close(first.features, full.features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SPLIT)
def test_stages_are_in_order(build: Build, name: str) -> None:
    net = build(name).eval()
    inputs = inputs_of(net)
    names = [s.name for s in net.stages]
    with torch.no_grad():
        base = net(inputs, names)
        for k, stage in enumerate(net.stages):
            kept = [p.clone() for p in stage.parameters()]
            for i, p in enumerate(stage.parameters()):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            moved = net(inputs, names)
            for j, other in enumerate(names):
                same = torch.equal(base.stages[other], moved.stages[other])
                head_only = j == k == len(names) - 1  # a last stage may lie behind the pooling
                assert same if j < k else (not same or head_only), (stage.name, other)
            assert not torch.equal(base.features, moved.features)
            for p, old in zip(stage.parameters(), kept):
                p.copy_(old)


@pytest.mark.parametrize("name", [*WHOLES, *SHARED_LAYERS])
def test_a_model_that_runs_as_a_whole_says_so(build: Build, name: str) -> None:
    net = build(name).eval()
    names = [s.name for s in net.stages]
    reason = net.can_start_from(names[1])
    assert reason
    assert type(net.model).__name__ in reason  # type: ignore[union-attr]
    inputs = inputs_of(net)
    with pytest.raises(StageError, match=type(net.model).__name__):  # type: ignore[union-attr]
        net.forward_from(names[1], torch.zeros(3, 4, 4), inputs)
    with pytest.raises(StageError, match="cannot be captured"):
        net(inputs, [names[0]])
    torch.testing.assert_close(net.forward_from(names[0], torch.zeros(1), inputs).features, net(inputs).features)
    if name != "crossvit_9_240":
        assert net(inputs, [names[-1]]).stages[names[-1]] is not None


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_reaches_every_parameter(build: Build, name: str) -> None:
    net = build(name)
    out = net(inputs_of(net))
    (out.features**2).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SPLIT)
def test_gradients_from_a_stage_equal_the_full_ones(build: Build, name: str) -> None:
    net = build(name).eval().double()  # so that kernels and layouts do not count
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(net).items()}
    names = [s.name for s in net.stages]
    start = names[len(names) // 2]
    later = [p for s in net.stages[names.index(start) :] for p in s.parameters()]
    before = names[names.index(start) - 1]
    full = net(inputs, [before])
    expected = torch.autograd.grad((full.features**2).sum(), [full.stages[before], *later], allow_unused=True)
    value = full.stages[before].detach().requires_grad_()
    part = net.forward_from(start, value, inputs)
    got = torch.autograd.grad((part.features**2).sum(), [value, *later], allow_unused=True)
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


DROPS = ("test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", ALL)
def test_modes(build: Build, name: str) -> None:
    net = build(name, drop_path_rate=0.5, drop_rate=0.1) if name in DROPS else build(name)
    inputs = inputs_of(net, 4)
    statistics = [b for layer in batch_norms(net) for b in layer.buffers()]
    random = any(getattr(m, "drop_prob", 0) or (isinstance(m, nn.Dropout) and m.p > 0) for m in net.modules())
    random = random or name == "ghostnet_050"  # which drops features by a call, at timm's default of 0.2
    assert random or name not in (*DROPS, *TEXTS)
    assert net.training, "as built, a backbone is in training mode"
    for training in (True, False, True):
        net.train(training)
        assert all(m.training is training for m in net.modules())
        state = {key: value.clone() for key, value in net.state_dict(keep_vars=True).items()}
        assert torch.equal(net(inputs).features, net(inputs).features) is not (training and random)
        for key, value in net.state_dict(keep_vars=True).items():
            moves = training and any(value is b for b in statistics)
            assert torch.equal(state[key], value) is not moves, key


@pytest.mark.parametrize("name", [*CHAINS, "beit_base_patch16_224", *TEXTS])
def test_checkpointed_gradients_and_buffers_are_equal(build: Build, name: str) -> None:
    results = []
    for checkpoint_grads in (False, True):
        net = build(name, checkpoint_grads=checkpoint_grads).train()
        torch.manual_seed(3)
        (net(inputs_of(net)).features ** 2).sum().backward()
        results.append((dict(net.named_parameters()), dict(net.named_buffers())))
    (expected, buffers), (got, other) = results
    for key, parameter in expected.items():
        torch.testing.assert_close(parameter.grad, got[key].grad, atol=1e-5, rtol=1e-4, msg=key)
    assert all(torch.equal(b, other[key]) for key, b in buffers.items())


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "bert", "modernbert"])
def test_a_copy_is_independent_and_nothing_is_left_behind(build: Build, name: str) -> None:
    net = build(name).eval()
    inputs = inputs_of(net)
    names = [s.name for s in net.stages]
    keys, members = list(net.state_dict()), [id(m) for m in net.modules()]
    expected = net(inputs, names)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(inputs, names).features, expected.features)
    start = copied.forward_from(names[1], expected.stages[names[0]], inputs)
    torch.testing.assert_close(start.features, expected.features, atol=1e-5, rtol=1e-5)
    assert all(copied.stage_of(p).name in names for p in copied.parameters())
    assert list(net.state_dict()) == keys
    assert [id(m) for m in net.modules()] == members
    hooks = [h for m in net.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    assert not any(hooks)
    assert not any("forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("name", TEXTS)
def test_padding_changes_nothing(build: Build, name: str) -> None:
    net = build(name).eval()
    inputs = tokens()
    together = net(inputs)
    for row in range(3):
        real = int(inputs["attention_mask"][row].sum())
        alone = net({key: value[row : row + 1, :real] for key, value in inputs.items()})
        torch.testing.assert_close(alone.features[0], together.features[row], atol=1e-5, rtol=1e-4)
