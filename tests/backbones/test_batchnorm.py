"""BatchNorm policies on numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones.tiny_models import images, tiny_timm
from tiny import TinyVision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from crossft.backbones import (
    Adapted,
    DomainBatchNorm,
    apply_batchnorm_policy,
    batch_norms,
    freeze_statistics_,
    reestimate_,
    set_domains,
)
from crossft.backbones.batchnorm import with_domains, without_statistics
from crossft.errors import BackboneError, ConfigError


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


class Net(nn.Module):
    """Takes inputs as a backbone does."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.body(inputs["x"])


def test_batch_norms_are_found_in_every_form() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)), nn.LayerNorm(3))
    assert len(batch_norms(net)) == 3
    fused = tiny_timm("test_efficientnet")
    assert {type(layer).__name__ for layer in batch_norms(fused)} == {"BatchNormAct2d"}
    assert len(batch_norms(fused)) == sum(name.endswith("running_mean") for name in fused.state_dict())
    assert batch_norms(tiny_timm("test_vit")) == []


def test_frozen_statistics_are_used_and_stay() -> None:
    layer = nn.BatchNorm1d(1, eps=0.0)
    layer.running_mean.fill_(2.0)
    layer.running_var.fill_(4.0)
    net = Net(layer, nn.Dropout(0.5)).train()
    apply_batchnorm_policy(net, "frozen")
    y = layer(column(2.0, 6.0, 0.0))
    assert torch.equal(y, column(0.0, 2.0, -1.0))
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.item() == 1.0  # sum of the normalized values
    assert layer.bias.grad is not None
    assert layer.bias.grad.item() == 3.0
    assert (layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()) == (2.0, 4.0, 0)
    assert net.training
    assert net.body[1].training


@pytest.mark.parametrize("policy", ["training", "reestimated"])
def test_training_statistics_follow(policy: Any) -> None:
    net = Net(nn.BatchNorm1d(1)).train()
    apply_batchnorm_policy(net, policy)
    net({"x": column(1.0, 3.0)})
    assert net.body[0].running_mean.item() == pytest.approx(0.2)


def per_domain(*ids: int, domains: int = 3) -> DomainBatchNorm:
    layer = DomainBatchNorm(nn.BatchNorm1d(1, eps=0.0), domains)
    layer.domains = torch.tensor(ids)
    return layer


def test_each_domain_has_its_own_statistics() -> None:
    layer = per_domain(0, 1, 0, 1)
    y = layer(column(1.0, 10.0, 3.0, 14.0))
    assert torch.equal(y, column(-1.0, -1.0, 1.0, 1.0))
    # momentum 0.1, from mean 0 and variance 1; unbiased variances 2 and 8
    torch.testing.assert_close(layer.running_mean[:, 0], torch.tensor([0.2, 1.2, 0.0]))
    torch.testing.assert_close(layer.running_var[:, 0], torch.tensor([1.1, 1.7, 1.0]))
    assert layer.seen.tolist() == [1, 1, 0]
    assert layer.base.running_mean is not None
    assert layer.base.running_mean.item() == 0.0


def test_evaluation_uses_the_domain_or_the_pretrained_statistics() -> None:
    layer = per_domain(0, 1, 2, -1, 7)
    layer.running_mean[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    layer.seen[:] = torch.tensor([1, 1, 0])
    assert layer.base.running_mean is not None
    layer.base.running_mean.fill_(5.0)
    layer.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer(column(10.0, 10.0, 10.0, 10.0, 10.0))
    assert torch.equal(y, column(9.0, 8.0, 5.0, 5.0, 5.0))  # domain 2 was never trained on, -1 and 7 are none
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_padding_and_lone_rows_do_not_move_statistics() -> None:
    layer = per_domain(0, 0, -1, 1)
    y = layer(column(1.0, 3.0, 100.0, 7.0))
    assert torch.equal(y, column(-1.0, 1.0, 100.0, 7.0))  # one value has no variance: the running statistics
    assert layer.seen.tolist() == [1, 0, 0]
    torch.testing.assert_close(layer.running_mean[:, 0], torch.tensor([0.2, 0.0, 0.0]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_domain_is_plain_batch_norm(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.normal_(plain.weight)
    other = nn.BatchNorm2d(3, momentum=momentum)
    other.load_state_dict(plain.state_dict())
    layer = DomainBatchNorm(other, 1)
    layer.domains = torch.zeros(4, dtype=torch.long)
    for _ in range(3):
        x, grad = torch.randn(4, 3, 5, 5) * 2 + 1, torch.randn(4, 3, 5, 5)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [plain(xs[0]), layer(xs[1])]
        torch.testing.assert_close(*ys, atol=1e-5, rtol=1e-5)
        for y in ys:
            y.backward(grad)
        torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.weight.grad, other.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.running_mean, layer.running_mean[0])
    torch.testing.assert_close(plain.running_var, layer.running_var[0])
    torch.testing.assert_close(plain.eval()(x), layer.eval()(x), atol=1e-5, rtol=1e-5)


def test_half_precision_in_half_precision_out() -> None:
    layer = per_domain(0, 0)
    y = layer(column(1.0, 3.0).bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, column(-1.0, 1.0).bfloat16())
    assert layer.running_mean.dtype == torch.float32


def test_a_backbone_with_domains(tmp_path: Any) -> None:
    net = tiny_timm("test_efficientnet").train()
    plain = tiny_timm("test_efficientnet").eval()
    inputs = images(net, 4)
    names, keys = [s.name for s in net.stages], set(net.state_dict())
    apply_batchnorm_policy(net, "per_domain", 2)
    apply_batchnorm_policy(net, "per_domain", 2)  # again, as after each train(): nothing is wrapped twice
    assert sum(isinstance(m, DomainBatchNorm) for m in net.modules()) == len(batch_norms(plain))
    assert [s.name for s in net.stages] == names
    assert {id(p) for s in net.stages for p in s.parameters()} == {id(p) for p in net.parameters()}
    with pytest.raises(ConfigError, match="one domain id a row: got nothing for 4 rows"):
        net(inputs)
    set_domains(net, torch.zeros(4, dtype=torch.long))
    net.eval()
    torch.testing.assert_close(net(inputs).features, plain(inputs).features, atol=1e-5, rtol=1e-5)
    net.train()
    torch.testing.assert_close(net(inputs).features, plain.train()(inputs).features, atol=1e-4, rtol=1e-4)
    out = net.eval()(inputs, [names[1]])
    torch.testing.assert_close(net.forward_from(names[2], out.stages[names[1]], {}).features, out.features)
    assert set(net.state_dict()) != keys
    with pytest.raises(BackboneError, match="per-domain BatchNorm statistics have no plain timm form"):
        net.export(tmp_path)
    set_domains(net, None)
    with pytest.raises(ConfigError, match="got nothing"):
        net(inputs)


def test_other_policies_keep_the_state_dict() -> None:
    keys = list(tiny_timm("test_efficientnet").state_dict())
    for policy in ("frozen", "training", "reestimated"):
        net = tiny_timm("test_efficientnet")
        apply_batchnorm_policy(net, policy)
        reestimate_(net, [images(net)])
        assert list(net.state_dict()) == keys
        tiny_timm("test_efficientnet").load_state_dict(net.state_dict())


def test_two_policies_at_once_are_refused() -> None:
    net = tiny_timm("test_resnet")
    apply_batchnorm_policy(net, "per_domain", 2)
    with pytest.raises(ConfigError, match="batchnorm='frozen' on a backbone that has per-domain statistics"):
        apply_batchnorm_policy(net, "frozen")
    with pytest.raises(ConfigError, match="choose one policy"):
        reestimate_(net, [images(net)])
    freeze_statistics_(net)
    assert all(m.training for m in net.modules() if isinstance(m, DomainBatchNorm))


@pytest.mark.parametrize(
    ("name", "policy", "domains", "message"),
    [
        ("test_resnet", "thawed", 0, "'thawed' is unknown; allowed: frozen, training, per_domain, reestimated"),
        ("test_resnet", "per_domain", 0, "needs domains >= 1, got 0"),
        ("test_vit", "per_domain", 2, "without BatchNorm layers"),
    ],
)
def test_policies_that_cannot_work(name: str, policy: Any, domains: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_batchnorm_policy(tiny_timm(name), policy, domains)


def test_reestimated_statistics_are_the_average_over_batches() -> None:
    layer = nn.BatchNorm1d(1, momentum=0.3)
    layer.num_batches_tracked.fill_(17)
    net = Net(layer, nn.Dropout(0.9)).train()
    layer.eval()
    reestimate_(net, [{"x": column(1.0, 3.0)}, {"x": column(5.0, 9.0)}])
    assert layer.running_mean.item() == 4.5  # of 2 and 7
    assert layer.running_var.item() == 5.0  # of 2 and 8
    assert (layer.num_batches_tracked.item(), layer.momentum) == (17, 0.3)
    assert (net.training, layer.training, net.body[1].training) == (True, False, True)


def test_reestimation_equals_update_bn() -> None:
    net, other = tiny_timm("test_efficientnet").train(), tiny_timm("test_efficientnet").train()
    batches = [images(net, 4, seed) for seed in range(3)]
    reestimate_(net, batches)
    update_bn(batches, other)  # type: ignore[arg-type]
    for a, b in zip(batch_norms(net), batch_norms(other)):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)


def test_a_failed_reestimation_changes_nothing() -> None:
    net = tiny_timm("test_resnet").eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def broken() -> Iterator[dict[str, Tensor]]:
        yield images(net)
        raise RuntimeError("unreadable")

    with pytest.raises(RuntimeError, match="unreadable"):
        reestimate_(net, broken())
    with pytest.raises(ConfigError, match="got no batch"):
        reestimate_(net, [])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    assert {layer.momentum for layer in batch_norms(net)} == {0.1}


def test_without_statistics_moves_nothing() -> None:
    plain, domain = nn.BatchNorm1d(1), per_domain(0, 0)
    before = [b.clone() for layer in (plain, domain) for b in layer.buffers()]
    with without_statistics([plain, domain]):
        y = plain(column(1.0, 3.0)), domain(column(1.0, 3.0))
    torch.testing.assert_close(y[1], column(-1.0, 1.0))
    torch.testing.assert_close(y[0], column(-1.0, 1.0), atol=1e-4, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, [b for layer in (plain, domain) for b in layer.buffers()]))
    assert plain.momentum == domain.base.momentum == 0.1


@pytest.mark.parametrize("policy", ["frozen", "per_domain"])
def test_adapters_with_statistics_of_each_domain_start_from_a_plain_backbone(policy: str) -> None:
    plain, adapted = TinyVision(batchnorm=True), Adapted(TinyVision(batchnorm=True), rank=2)
    apply_batchnorm_policy(plain, policy, 1)
    apply_batchnorm_policy(adapted, "per_domain", 2)
    for layer in batch_norms(plain):
        torch.nn.init.uniform_(layer.running_mean)
    state = with_domains(adapted, plain.state_dict(), ["new", "old"], ["old"])
    adapted.load_state_dict(state)
    ours = dict(adapted.named_modules())["inner.middle.1"]
    theirs = dict(plain.named_modules())["middle.1"]
    old = theirs.running_mean[0] if policy == "per_domain" else theirs.running_mean
    base = theirs.base.running_mean if policy == "per_domain" else theirs.running_mean
    assert torch.equal(ours.running_mean[1], old)
    assert torch.equal(ours.running_mean[0], base)
    assert torch.equal(ours.base.running_mean, base)
    assert ours.seen.tolist() == [0, 0]
