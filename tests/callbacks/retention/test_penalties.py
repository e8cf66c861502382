"""EWC, MAS and SI on numbers: bowls with known minima, paths with known sums, chains of legs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from retention_cases import data_of, fit, images
from tiny import TinyVision
from torch import nn

from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints
from crossft.callbacks.retention import EWC, L2SP, MAS, SI, Mixout, OnlineEWC
from crossft.callbacks.retention.importance import Importance, Measure, carried, hash_of
from crossft.callbacks.retention.quadratic import QuadraticPenalty
from crossft.callbacks.retention.si import PathPenalty
from crossft.data.passes import batch_of
from crossft.errors import CheckpointError, ConfigError
from crossft.runs import RunFolder
from crossft.tasks import Classification


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


class Bowl(nn.Module):
    """1/2 (w - a)^T A (w - a), in float64."""

    def __init__(self, a: torch.Tensor, curvature: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.a, self.curvature, self.w = a, curvature, nn.Parameter(start.clone())

    def forward(self) -> torch.Tensor:
        d = self.w - self.a
        return 0.5 * d @ self.curvature @ d


def bowls() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    root_a = torch.randn(4, 4, dtype=torch.float64, generator=g)
    curvature = root_a @ root_a.T + torch.eye(4, dtype=torch.float64)
    a, b, f = (torch.rand(4, dtype=torch.float64, generator=g) + s for s in (2.0, -2.0, 0.1))
    return a, b, f, curvature


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0, 200.0])
def test_ewc_settles_between_two_bowls(weight: float) -> None:
    """min of bowl a plus weight/2 (w - b)^T F (w - b) lies at (A + weight F)^-1 (A a + weight F b)."""
    a, b, f, curvature = bowls()
    bowl = Bowl(a, curvature, b)
    penalty = QuadraticPenalty({"w": bowl.w})
    penalty.fill({"w": f}, {})
    rate = 1.0 / (torch.linalg.eigvalsh(curvature).max() + weight * f.max())
    optimizer = torch.optim.SGD([bowl.w], lr=float(rate))
    for _ in range(3000):
        optimizer.zero_grad()
        bowl().backward()
        penalty.add_grad_(weight)
        optimizer.step()
    importance = torch.diag(f.float().double())
    expected = torch.linalg.solve(curvature + weight * importance, curvature @ a + weight * importance @ b)
    assert torch.allclose(bowl.w.detach(), expected, atol=1e-5)
    if weight == 0.0:
        assert torch.allclose(bowl.w.detach(), a, atol=1e-5)


def test_value_and_gradient_equal_autograd_and_frozen_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    penalty = QuadraticPenalty(dict(net.named_parameters()))
    values = {n: torch.rand_like(p) for n, p in net.named_parameters()}
    penalty.fill(values, {})
    starts = {n: p.detach().clone() for n, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    net[1].requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    own = {n: p for n, p in net.named_parameters() if p.requires_grad}
    expected = sum(0.5 * (values[n] * (p - starts[n]) ** 2).sum() for n, p in own.items())
    grads = torch.autograd.grad(0.7 * expected, list(own.values()))
    assert torch.allclose(penalty.value().double(), expected, rtol=1e-5)
    penalty.add_grad_(0.7)
    assert torch.allclose(net[0].weight.grad, 1 + grads[0], rtol=1e-5)
    assert torch.allclose(net[0].bias.grad, grads[1], rtol=1e-5)
    assert net[1].weight.grad is None


def test_path_sums_are_the_fall_of_the_loss() -> None:
    """Sum over weights of the path integral = the fall, up to the second-order rest of each step, which is known."""
    a, b, _, curvature = bowls()
    bowl = Bowl(a, curvature, b)
    penalty = PathPenalty({"w": bowl.w})
    optimizer = torch.optim.SGD([bowl.w], lr=0.002)
    start, rest = float(bowl().detach()), 0.0
    for _ in range(1000):
        optimizer.zero_grad()
        bowl().backward()
        penalty.note()
        before = bowl.w.detach().clone()
        optimizer.step()
        penalty.advance()
        moved = bowl.w.detach() - before
        rest += float(0.5 * moved @ curvature @ moved)
    fall = start - float(bowl().detach())
    assert float(penalty.path_of("w").sum()) == pytest.approx(fall + rest, rel=1e-4)
    assert float(penalty.path_of("w").sum()) == pytest.approx(fall, rel=0.05)
    total = penalty.total(1e-3)["w"]
    expected = penalty.path_of("w").clamp(min=0) / ((bowl.w - b).float() ** 2 + 1e-3)
    assert torch.allclose(total, expected.detach(), rtol=1e-5)
    assert (total >= 0).all()


def test_a_step_that_overflowed_adds_nothing() -> None:
    w = nn.Parameter(torch.zeros(2))
    penalty = PathPenalty({"w": w})
    w.grad = torch.tensor([float("inf"), float("nan")])
    penalty.note()
    penalty.advance()
    assert (penalty.path_of("w") == 0).all()


def test_si_reads_the_gradient_before_penalties(root: Path) -> None:
    """A strong L2-SP beside it pulls from the second step on; the path is that of the loss's own gradient."""

    class Reads(Callback):
        def __init__(self) -> None:
            self.gradients: list[list[torch.Tensor]] = []
            self.weights: list[list[torch.Tensor]] = []

        def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
            self.gradients.append([p.grad.clone() for p in task.backbone.parameters()])
            self.weights.append([p.detach().clone() for p in task.backbone.parameters()])

    reads = Reads()
    _, task = fit(data_of(root), {"a": L2SP(weight=5.0), "si": SI()}, extra=(reads,), max_steps=3)
    term = task.attachments.penalties["si"]
    ends = [*reads.weights[1:], [p.detach() for p in task.backbone.parameters()]]
    steps = list(zip(reads.gradients, reads.weights, ends, strict=True))
    assert len(steps) == 3
    for i, (name, _) in enumerate(task.backbone.named_parameters()):
        expected = -sum(g[i] * (after[i] - before[i]) for g, before, after in steps)
        assert torch.allclose(term.path_of(name), expected, rtol=1e-4, atol=1e-9)
        pulled = -sum((g[i] + 5 * (w[i] - reads.weights[0][i])) * (after[i] - w[i]) for g, w, after in steps)
        assert not torch.allclose(expected, pulled, rtol=1e-2, atol=1e-8), "the pull would have been seen"


def leg(root: Path, folder: Path, parent: Path | None, methods: dict[str, Callback], **kwargs):
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    run.write_summary(status="running", parent=None if parent is None else str(parent))
    more = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    return fit(data_of(root, **kwargs), methods, extra=(Checkpoints(folder),), **more)[1]


def test_si_and_online_ewc_carry_importance_from_leg_to_leg(root: Path, tmp_path: Path) -> None:
    def methods() -> dict[str, Callback]:
        return {"si": SI(weight=3.0), "ewc": OnlineEWC(weight=3.0, decay=0.5)}

    first = leg(root, tmp_path / "a", None, methods(), source="sketch", target="photo")
    second = leg(root, tmp_path / "b", tmp_path / "a", methods(), source="photo", target="sketch")
    recorded = first.attachments.penalties["si"].total(1e-3)
    held = second.attachments.penalties["si"]
    assert all(torch.equal(held.importance_of(n), recorded[n]) for n in recorded)
    assert held.provenance["legs"] == 1
    assert sum(float(v.sum()) for v in recorded.values()) > 0
    assert float(held.value()) > 0
    old, new = (t.attachments.penalties["ewc"] for t in (first, second))
    name = "last.0.weight"
    fisher = Importance.load(tmp_path / "b" / "anchors" / "ewc.safetensors")
    assert torch.equal(new.importance_of(name), fisher.values[name])
    assert fisher.provenance["before"]["domains"] == ["sketch"]
    alone = leg(root, tmp_path / "c", None, {"ewc": OnlineEWC(decay=0.5)}, source="photo", target="sketch")
    own = alone.attachments.penalties["ewc"].importance_of(name)
    assert torch.allclose(new.importance_of(name), own + 0.5 * old.importance_of(name), atol=1e-9)
    with pytest.raises(ConfigError, match=r"source_leg\.methods\.other"):
        leg(root, tmp_path / "d", tmp_path / "a", {"other": SI()})
    assert carried(alone, "ewc", required=False) is None


def test_a_file_of_another_run_gives_the_same_penalty_and_other_weights_refuse_it(root: Path, tmp_path: Path) -> None:
    first = leg(root, tmp_path / "a", None, {"ewc": EWC(10.0)})
    file = tmp_path / "a" / "anchors" / "ewc.safetensors"
    again = fit(data_of(root, source=None), {"ewc": EWC(10.0, importance=str(file))})[1]
    for n, p in first.backbone.named_parameters():
        assert torch.equal(p, again.backbone.get_parameter(n))
    found = Importance.load(file)
    assert found.provenance["rows"] == 32
    assert found.provenance["labels"] == "exact"
    found.provenance["weights"] = "0123"
    found.save(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="measured at other weights"):
        fit(data_of(root), {"ewc": EWC(importance=str(tmp_path / "other.safetensors"))})
    with pytest.raises(CheckpointError, match="cannot be read"):
        Importance.load(tmp_path / "nothing.safetensors")
    small = Importance({"stem.1.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"stem\.1\.bias is \(3,\)"):
        small.fit_to({"stem.1.bias": nn.Parameter(torch.zeros(12))}, "x", ())


def test_a_pass_leaves_the_task_as_it_was_and_measures_what_may_train(root: Path) -> None:
    data = data_of(root)
    torch.manual_seed(0)
    task = Classification(TinyVision(dropout=0.5, batchnorm=True), list(data.domains), batchnorm="training")
    data.bind(task.backbone.input_spec)
    task.train_stages(["last"])
    before, modes = copy.deepcopy(task.state_dict()), [m.training for m in task.modules()]
    rng, flags = torch.get_rng_state(), [p.requires_grad for p in task.parameters()]
    found = Measure(labels="sampled").run(task, data)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in task.modules()]
    assert flags == [p.requires_grad for p in task.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())
    names = [n for n, _ in task.backbone.named_parameters()]
    assert list(found.values) == [n for n in names if n.startswith("last.")]
    assert found.provenance["left_out"] == [n for n in names if not n.startswith("last.")]
    assert all(v.dtype == torch.float32 and float(v.max()) > 0 for v in found.values.values())
    assert found.provenance["weights"] == hash_of(task.backbone)


def test_the_exact_pass_is_the_mean_over_source_rows_of_squared_gradients(root: Path) -> None:
    data = data_of(root)
    torch.manual_seed(0)
    task = Classification(TinyVision(), list(data.domains)).eval()
    data.bind(task.backbone.input_spec)
    found = Measure().run(task, data)
    total, count = torch.zeros_like(task.backbone.last[0].weight), 0
    source = data.prepared[0]
    for row in source.rows("train"):
        batch = batch_of(data, [int(row)], 0)
        p = task.backbone(batch.inputs).features
        log_p = task.heads["photo"](p).log_softmax(1)[0]
        for c in range(2):
            (g,) = torch.autograd.grad(log_p[c], task.backbone.last[0].weight, retain_graph=True)
            total += log_p[c].exp().detach() * g**2
        count += 1
    assert torch.allclose(found.values["last.0.weight"], total / count, rtol=1e-3, atol=1e-9)


def test_importance_is_measured_under_other_methods_of_the_leg(root: Path) -> None:
    """Layers that Mixout stands in for are measured like the plain ones."""
    plain = fit(data_of(root), {"ewc": EWC(), "mas": MAS()}, max_steps=1)[1].attachments.penalties
    mixed = fit(data_of(root), {"ewc": EWC(), "mas": MAS(), "mixout": Mixout()}, max_steps=1)[1].attachments.penalties
    for name in ("ewc", "mas"):
        for n in plain[name].named:
            assert torch.allclose(plain[name].importance_of(n), mixed[name].importance_of(n), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EWC(labels="best"), "labels='best'"),
        (lambda: EWC(samples=0), "samples=0"),
        (lambda: EWC(weight=-1.0), "weight=-1"),
        (lambda: OnlineEWC(decay=1.5), "decay=1.5"),
        (lambda: SI(damping=0.0), "damping=0"),
        (lambda: MAS(chunk=0), "chunk=0"),
    ],
)
def test_bad_settings_are_named(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
