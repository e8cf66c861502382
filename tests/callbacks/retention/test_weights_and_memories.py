"""Mixout, stochastic norm, drift limits, RecAdam, rehearsal and A-GEM inside a fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from retention_cases import data_of, fit, images
from tiny import TinyVision, flat
from torch import nn
from torch.nn import functional as F

from crossft.callbacks.retention import AGEM, DERPlusPlus, DriftLimit, Mixout, Replay, StochNorm
from crossft.callbacks.retention.drift import length
from crossft.callbacks.retention.mixout import MixoutConv2d, MixoutLinear
from crossft.callbacks.retention.rehearsal import ids_of_rows, rows_of
from crossft.callbacks.retention.stochnorm import StochasticNorm
from crossft.callbacks.retention.swaps import put_back, swap_layers
from crossft.data.passes import batch_of, training_rows
from crossft.errors import ConfigError
from crossft.functional.modes import evaluating
from crossft.optim import RecAdam, reset_moments_


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


# Mixout, stochastic norm


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_mixed_layer_is_the_plain_one_in_the_mean_and_in_evaluation(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
    x = torch.randn(5, 4) if kind == "linear" else torch.randn(2, 2, 7, 7)
    start = layer.weight.detach() + 0.3 * torch.randn_like(layer.weight)
    mixed = MixoutLinear(layer, start, 0.5) if kind == "linear" else MixoutConv2d(layer, start, 0.5)
    assert mixed.weight is layer.weight
    assert torch.equal(mixed.eval()(x), layer(x))
    mixed.train()
    outs = []
    for seed in range(3000):
        mixed.seed = seed
        outs.append(mixed(x).detach())
    spread = torch.stack(outs).std(0)
    assert ((torch.stack(outs).mean(0) - layer(x)).abs() < 5 * spread / 3000**0.5 + 1e-6).all()
    assert spread.max() > 0.1


def test_layers_are_put_back_and_names_stay(root: Path) -> None:
    names: list[str] = []

    class Looks(Callback):
        def on_train_start(self, trainer, task) -> None:
            names.extend(task.state_dict())
            assert sum(isinstance(m, MixoutLinear) for m in task.backbone.modules()) == 3

    _, task = fit(data_of(root), {"mixout": Mixout(p=0.5)}, extra=(Looks(),))
    assert names == list(task.state_dict())
    assert not any(isinstance(m, MixoutLinear) for m in task.modules())
    assert all(type(m) is nn.Linear for n, m in task.backbone.named_modules() if n.endswith(".0") and "stem" not in n)


def test_a_layer_that_stands_twice_is_replaced_once() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    swaps = swap_layers(net, lambda n, m: MixoutLinear(m, m.weight, 0.5) if isinstance(m, nn.Linear) else None)
    assert net[0] is net[2]
    assert isinstance(net[0], MixoutLinear)
    put_back(swaps)
    assert net[0] is net[2] is shared


def test_stochastic_norm_takes_each_channels_statistics_from_batch_or_running() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(6)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.weight.data.uniform_(0.5, 2)
    x, mean = torch.randn(4, 6, 3, 3), layer.running_mean.clone()
    new = StochasticNorm(layer, 0.5)
    running = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    batch = F.batch_norm(x, None, None, layer.weight, layer.bias, True)
    out, chosen = new.train()(x), []
    for c in range(6):
        a, b = (torch.allclose(out[:, c], ref[:, c], atol=1e-5) for ref in (running, batch))
        assert a != b
        chosen.append(a)
    assert len(set(chosen)) == 2
    assert torch.allclose(new.running_mean, 0.9 * mean + 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert new.num_batches_tracked == 1
    assert torch.allclose(new.eval()(x), F.batch_norm(x, new.running_mean, new.running_var, new.weight, new.bias))


def test_stochastic_norm_refuses_a_policy_that_fixes_statistics(root: Path) -> None:
    with pytest.raises(ConfigError, match="batchnorm=training"):
        fit(data_of(root), {"stochnorm": StochNorm()})
    _, task = fit(data_of(root), {"stochnorm": StochNorm()}, batchnorm=True)
    (layer,) = [m for m in task.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert type(layer) is nn.BatchNorm1d
    assert layer.num_batches_tracked == 4


# Drift limits, RecAdam


@pytest.mark.parametrize(("norm", "relative"), [("frobenius", True), ("mars", True), ("mars", False)])
def test_no_weight_goes_beyond_its_radius(root: Path, norm: str, relative: bool) -> None:
    """And everything that watches weights after a step sees projected ones."""
    seen: list[float] = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer, task, *_) -> None:
            start = task.attachments.penalties["drift"]
            for name, p in start.named.items():
                limit = 0.02 * (float(length(start.of(name), norm)) if relative else 1.0)
                seen.append(float(length(p.detach() - start.of(name), norm)) / limit)

    fit(data_of(root), {"drift": DriftLimit(0.02, norm, relative)}, extra=(Watches(),))
    assert max(seen) == pytest.approx(1.0, abs=1e-3)
    held = fit(data_of(root), {"drift": DriftLimit(0.0, norm, relative)})[1]
    start = held.attachments.penalties["drift"]
    assert all(torch.equal(p, start.of(n)) for n, p in start.named.items())


def test_mars_is_the_largest_row_sum() -> None:
    d = torch.tensor([[1.0, -2.0], [0.5, 0.5]])
    assert length(d, "mars") == 3
    assert length(d.view(2, 2, 1, 1), "mars") == 3
    assert length(d, "frobenius") == d.norm()


def two(make) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    w, h = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))
    groups = [
        {"params": [w], "name": "stem/decay", "lr": 0.01},
        {"params": [h], "name": "head.photo/decay", "lr": 0.03},
    ]
    return w, h, make(groups)


def descend(w, h, optimizer, steps: int = 6) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        ((w - 3 * i) ** 2).sum().add((h**3).sum()).backward()
        optimizer.step()


def test_recadam_at_lambda_one_is_adam() -> None:
    ends = []
    for make in (
        lambda g: RecAdam(g, lr=0.01, weight_decay=0.1, rate=10.0, middle=0.0, pull=50.0),
        lambda g: torch.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    ):
        w, h, optimizer = two(make)
        descend(w, h, optimizer)
        ends.append(torch.cat([w.detach(), h.detach()]))
    assert torch.allclose(*ends, atol=1e-5)
    assert RecAdam([nn.Parameter(torch.zeros(1))], lr=0.001, rate=10.0, middle=0.0).share(6) == pytest.approx(1.0)


def test_recadam_follows_its_equation_and_leaves_heads_to_adam() -> None:
    """w <- w - lr lambda Adam(g) - lr (1 - lambda) pull (w - w0), by hand in float64."""
    w, h, optimizer = two(lambda g: RecAdam(g, lr=0.01, rate=1.0, middle=3.0, pull=20.0))
    own, start = w.detach().double().clone(), w.detach().double().clone()
    m, v = torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 7):
        g = 2 * (own - 3 * (t - 1))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        share = 1 / (1 + torch.exp(torch.tensor(-(t - 3.0)).double()))
        own = own - 0.01 * share * adam - 0.01 * (1 - share) * 20 * (own - start)
    descend(w, h, optimizer)
    assert torch.allclose(w.detach().double(), own, atol=1e-5)
    _, plain, adam_w = two(lambda g: torch.optim.AdamW(g, lr=0.01, weight_decay=0.0))
    descend(w, plain, adam_w)
    assert torch.equal(h, plain)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.03]


def test_a_weight_that_thaws_late_is_anchored_where_it_was() -> None:
    w, h, optimizer = two(lambda g: RecAdam(g, lr=0.01, middle=0.0, pull=1.0))
    h.grad = torch.ones(1)
    optimizer.step()
    assert "start" not in optimizer.state[w]
    w.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(optimizer.state[w]["start"], torch.tensor([1.0, -2.0]))
    assert "start" not in optimizer.state[h]


def test_recadam_keeps_its_starting_points_when_moments_are_reset() -> None:
    """The step after it is Adam's first, pulled to where the run began, at the annealing's place in the run."""
    w, h, optimizer = two(lambda g: RecAdam(g, lr=0.01, rate=1.0, middle=3.0, pull=20.0))
    descend(w, h, optimizer, 3)
    before = w.detach().clone()
    reset_moments_(optimizer)
    descend(w, h, optimizer, 1)
    start, share = torch.tensor([1.0, -2.0]), 1 / (1 + math.exp(-(4 - 3.0)))
    assert torch.equal(optimizer.state[w]["start"], start)
    expected = before - 0.01 * (1 - share) * 20 * (before - start) - 0.01 * share * before.sign()  # Adam's first step
    assert torch.allclose(w, expected, atol=1e-5)


def test_resetting_moments_is_the_same_as_a_new_optimizer() -> None:
    ends = []
    for reset in (False, True):
        for make in (lambda g: torch.optim.AdamW(g, lr=0.01), lambda g: RecAdam(g, rate=10.0, middle=0.0, pull=0.0)):
            w, h, optimizer = two(make)
            if reset:
                descend(w, h, optimizer, 3)
                with torch.no_grad():
                    w.copy_(torch.tensor([1.0, -2.0]))
                    h.copy_(torch.tensor([0.5]))
                reset_moments_(optimizer)
            for group in optimizer.param_groups:
                group["recalled"] = 10
            descend(w, h, optimizer, 3)
            ends.append(torch.cat([w.detach(), h.detach()]))
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


# Rehearsal


def test_a_memory_has_its_share_of_every_batch_and_makes_no_epoch(root: Path) -> None:
    seen: list[list[int]] = []

    class Counts(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
            seen.append([int((batch.domains == i).sum()) for i in (0, 1)])
            ids.update(batch.sample_ids[batch.domains == 0].tolist())
            assert batch.labeled.all()

    ids: set[int] = set()
    data = data_of(root)
    trainer, _ = fit(data, {"replay": Replay(size=9, share=0.25)}, extra=(Counts(),), max_steps=-1, max_epochs=1)
    assert seen[:-1] == [[4, 12]] * (len(seen) - 1)
    target = len(data.prepared[1].rows("train"))
    assert sum(t for _, t in seen) == target
    assert len(ids) == 9
    assert trainer.global_step == len(seen) == -(-target // 12)


def test_rows_of_equal_content_in_two_domains_are_told_apart(root: Path) -> None:
    """photo and flipped hold the same images under other labels: a resume must not remember both for one."""
    data = data_of(root, source=["photo", "flipped"])
    data.bind(TinyVision().input_spec)
    everything = training_rows(data, "source")
    contents = [{int(data.dataset.sample_ids[r]) for r in everything[n]} for n in (0, 1)]
    assert len(contents[0] & contents[1]) > 10
    rows = {0: everything[0][:7], 1: everything[1][3:5]}
    again = rows_of(data, ids_of_rows(data, rows))
    assert {n: own.tolist() for n, own in again.items()} == {n: own.tolist() for n, own in rows.items()}


def test_dark_memory_holds_the_starting_models_logits(root: Path) -> None:
    starts: dict[str, torch.Tensor] = {}

    class Keeps(Callback):
        def on_train_start(self, trainer, task) -> None:
            term, rows = task.attachments.terms["der"], der.rows[0]
            with evaluating(task), torch.no_grad():
                batch = batch_of(trainer.datamodule, rows.tolist(), 0)
                order = batch.sample_ids.argsort()
                starts["logits"] = task.model_step(batch).logits["photo"][order]
            assert torch.equal(term.sample_ids, batch.sample_ids[order])

    der = DERPlusPlus(weight=1.0, size=9)
    _, task = fit(data_of(root), {"der": der}, extra=(Keeps(),))
    term = task.attachments.terms["der"]
    assert torch.allclose(term.logits, starts["logits"], atol=1e-6)
    batch = batch_of(task.trainer.datamodule, der.rows[0][:4].tolist(), 0)
    batch.quota = (4.0, 0.0)
    step = task.eval().model_step(batch)
    place = [term.sample_ids.tolist().index(i) for i in batch.sample_ids.tolist()]
    expected = (step.logits["photo"] - term.logits[place]).pow(2).mean()
    assert torch.allclose(term(step, task), expected, atol=1e-6)
    batch.sample_ids = batch.sample_ids + 1
    assert term(step, task) == 0


def test_a_memory_that_fills_the_batch_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="filled by memories"):
        fit(data_of(root), {"a": Replay(share=0.5), "b": Replay(share=0.5)})
    for make, match in (
        (lambda: Replay(share=1.0), "share=1"),
        (lambda: Replay(size=0), "size=0"),
        (lambda: Replay(keep="best"), "keep='best'"),
        (lambda: AGEM(batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(ConfigError, match=match):
            make()


def test_agem_never_raises_the_reference_loss_to_first_order(root: Path) -> None:
    """After the projection g . g_ref >= 0; g is the step's own gradient where it agreed before."""
    agreements: list[tuple[float, float, bool]] = []

    class Probes(Callback):
        def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
            self.task, self.before = task, [p.grad.clone() for p in self.params(task)]
            rule = task.attachments.projections["agem"]
            self.reference = rule._reference(task, self.params(task))

        @staticmethod
        def params(task):
            return [p for m in (task.backbone, task.heads) for p in m.parameters() if p.requires_grad]

        def on_train_batch_end(self, trainer, task, *_) -> None:
            after = [p.grad for p in self.params(task)]
            dots = [
                sum(float((g * r).sum()) for g, r in zip(gs, self.reference, strict=True))
                for gs in (self.before, after)
            ]
            same = all(torch.equal(a, b) for a, b in zip(after, self.before, strict=True))
            agreements.append((*dots, same))

    fit(data_of(root, target="flipped"), {"agem": AGEM(size=20, batch_size=20)}, extra=(Probes(),))
    assert any(before < -1e-4 for before, _, _ in agreements)
    for before, after, same in agreements:
        assert after >= -1e-5
        assert same == (before >= 0)


def test_reference_batches_go_through_the_whole_memory(root: Path) -> None:
    data = data_of(root, target="flipped")
    _, task = fit(data, {"agem": AGEM(size=9, batch_size=6)})
    rule = task.attachments.projections["agem"]
    drawn = [m for step in range(3) for m in rule.drawn(step)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == sorted(rule._members)
    assert rule.drawn(1) == rule.drawn(1)
    state = flat(task)
    rule.project_(task)
    assert torch.equal(flat(task), state)
