"""LwF, feature distillation, DELTA, BSS, R3F, SMART and Co-Tuning against their equations, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from retention_cases import data_of, fit, images
from steps import make_step, make_task
from tiny import TinyVision, flat
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.callbacks.retention import BSS, DELTA, R3F, SMART, CoTuning, FeatureDistillation, LwF
from crossft.callbacks.retention.bss import SpectralShrinkage
from crossft.callbacks.retention.cotuning import TranslatedLabels, relation
from crossft.callbacks.retention.delta import ChannelDistance, channel_attention, channels_last
from crossft.callbacks.retention.features import OldFeatures
from crossft.callbacks.retention.lwf import OldOutputs
from crossft.callbacks.retention.r3f import NoisyAgreement
from crossft.callbacks.retention.smart import WorstAgreement
from crossft.callbacks.retention.teacher import Teacher
from crossft.errors import ConfigError, StageError
from crossft.types import Batch

DOMAINS = [0, 1, 1, 1, -1]  # a source row, three target rows, a padding row


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def stepped(task, x: torch.Tensor, targets: list[int] | None = None, capture: tuple[str, ...] = ()):
    """A step of the task on these pixels, with gradients."""
    given = torch.tensor(targets or [-1] * len(x))
    batch = Batch({"pixel_values": x}, given, given >= 0, torch.tensor(DOMAINS), torch.arange(len(x)), (1.0, 3.0), 4.0)
    task.attachments.attach("wants", _Wants(capture), 0.0) if capture else None
    return task.train().model_step(batch)


class _Wants(OldFeatures):
    def __init__(self, stages: tuple[str, ...]) -> None:
        nn.Module.__init__(self)
        self.needs_stages = stages


def tiny(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return make_task(backbone=TinyVision(**kwargs)), torch.randn(5, 3, 8, 8)


def moved(task) -> None:
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_lwf_holds_the_old_outputs_on_target_rows() -> None:
    task, x = tiny()
    term = LwF(temperature=3.0).build(task)
    assert isinstance(term, OldOutputs)
    old = task.eval().heads["photo"](task.backbone({"pixel_values": x}).features).detach()
    moved(task)
    step = stepped(task, x)
    value = term(step, task)
    p, q = (old / 3).softmax(1), (step.logits["photo"] / 3).log_softmax(1)
    kl = 9 * (p * (p.log() - q)).sum(1)
    assert torch.allclose(value, kl[1:4].mean(), atol=1e-6)
    grads = torch.autograd.grad(value, step.logits["photo"])[0]
    assert (grads[[0, 4]] == 0).all()


def test_at_the_start_lwf_and_features_are_zero_and_pull_nowhere() -> None:
    task, x = tiny()
    for term in (LwF().build(task), FeatureDistillation().build(task)):
        step = stepped(task, x)
        value = term(step, task)
        assert value.detach().abs() < 1e-6
        grads = torch.autograd.grad(value, list(task.backbone.parameters()))
        assert max(float(g.abs().max()) for g in grads) < 1e-6


def test_a_teacher_never_changes(root: Path) -> None:
    """Frozen, in evaluation mode, its BatchNorm statistics still, while the student trains."""
    start: dict[str, torch.Tensor] = {}

    class Keeps(Callback):
        def on_train_start(self, trainer, task) -> None:
            start.update({k: v.clone() for k, v in task.attachments.terms["lwf"].state_dict().items()})

    _, task = fit(data_of(root), {"lwf": LwF()}, batchnorm=True, dropout=0.5, extra=(Keeps(),))
    term = task.attachments.terms["lwf"]
    assert any("running_mean" in k for k in start)
    assert all(torch.equal(v, start[k]) for k, v in term.state_dict().items())
    assert not any(p.requires_grad for p in term.parameters())
    task.train()
    assert not any(m.training for m in term.teacher.modules())
    student = {k: v for k, v in task.state_dict().items() if "running_mean" in k}
    assert all(not torch.equal(v, start[f"teacher.{k}"]) for k, v in student.items())


def test_a_source_label_space_of_its_own_keeps_its_head_which_trains_along(root: Path) -> None:
    heads = {}
    for train in (True, False):
        method = LwF(weight=10.0, train_heads=train)
        _, task = fit(data_of(root, target="art"), {"lwf": method})
        heads[train] = task.heads["photo"]
        assert task.trained_heads == ({"photo", "art"} if train else {"art"})
    old = task.attachments.terms["lwf"].teacher.heads["photo"]
    assert torch.equal(flat(heads[False]), flat(old))
    assert not torch.equal(flat(heads[True]), flat(old))


def test_features_of_stages_and_of_the_end() -> None:
    task, x = tiny()
    pooled, staged = FeatureDistillation().build(task), FeatureDistillation(stages=["stem", "last"]).build(task)
    before = task.eval().backbone({"pixel_values": x}, capture=("stem", "last"))
    moved(task)
    step = stepped(task, x, capture=("stem", "last"))
    expected = 0.5 * (step.features - before.features)[1:4].pow(2).mean()
    assert torch.allclose(pooled(step, task), expected, atol=1e-7)
    parts = [0.5 * (step.stages[s] - before.stages[s])[1:4].pow(2).mean() for s in ("stem", "last")]
    assert torch.allclose(staged(step, task), sum(parts), atol=1e-7)
    unknown = OldFeatures(Teacher(task.backbone), (1,), ("nowhere",))
    with pytest.raises(StageError):
        unknown(step, task)


def test_delta_weighs_channels_by_attention() -> None:
    task, x = tiny()
    term = ChannelDistance(Teacher(task.backbone), (1,), ("middle",), [12])
    term.attention_0.copy_(torch.rand(12))
    before = task.eval().backbone({"pixel_values": x}, capture=("middle",)).stages["middle"]
    moved(task)
    step = stepped(task, x, capture=("middle",))
    distance = (step.stages["middle"] - before).pow(2)
    expected = 0.5 * (distance * term.attention_0)[1:4].sum(1).mean()
    assert torch.allclose(term(step, task), expected, atol=1e-7)
    assert channels_last(torch.zeros(2, 3, 4, 5)).shape == (2, 20, 3)


def test_delta_attention_is_the_softmax_of_what_each_channel_is_worth() -> None:
    task, x = tiny()
    targets = torch.tensor([0, 1, 2, 0, 1])
    batch = Batch({"pixel_values": x}, targets, targets >= 0, torch.ones(5, dtype=torch.long), torch.arange(5))
    found = channel_attention(task, [batch], "middle", 12)
    with torch.no_grad():
        value = task.eval().backbone({"pixel_values": x}, capture=("middle",)).stages["middle"]

        def loss(v: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(task.heads["photo"](task.backbone.last(v)), targets)

        rises = [loss(value * (torch.arange(12) != c)) - loss(value) for c in range(12)]
    assert torch.allclose(found, 12 * torch.stack(rises).softmax(0), atol=1e-5)
    assert float(found.mean()) == pytest.approx(1.0)


def test_bss_shrinks_the_smallest_singular_values() -> None:
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    value = SpectralShrinkage((1,), 2)(make_step(x, DOMAINS), None)
    gram = x[1:4] @ x[1:4].T
    assert torch.allclose(value, torch.linalg.eigvalsh(gram)[:2].sum())
    grad = torch.autograd.grad(value, x)[0]
    assert torch.allclose(grad, torch.autograd.grad(torch.linalg.eigvalsh(gram)[:2].sum(), x)[0])
    assert (grad[[0, 4]] == 0).all()
    none = SpectralShrinkage((1,), 2)(make_step(x, [0, 0, 0, 0, -1]), None)
    assert none == 0
    assert none.requires_grad


def test_r3f_compares_with_noise_after_the_first_stage() -> None:
    task, x = tiny()
    term = NoisyAgreement("stem", "middle", "photo", "multiclass", (1,), 0.3, "normal", seed=11)
    step = stepped(task, x, capture=("stem",))
    state = torch.get_rng_state()
    value = term(step, task)
    assert torch.equal(state, torch.get_rng_state())
    noise = term._drawn(step.stages["stem"], step)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.3)
    a = step.logits["photo"].log_softmax(1)
    b = task.heads["photo"](task.backbone.last(task.backbone.middle(step.stages["stem"] + noise))).log_softmax(1)
    expected = (a.exp() * (a - b) + b.exp() * (b - a)).sum(1)[1:4].mean()
    assert torch.allclose(value, expected, atol=1e-6)
    again = term(step, task)
    assert torch.equal(value, again)
    step.batch.step = 1
    assert not torch.equal(value, term(step, task))


def test_the_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    task, x = tiny()
    term = NoisyAgreement("stem", "middle", "photo", "multiclass", (1,), 0.3, "uniform", seed=11)
    step = stepped(task, x, capture=("stem",))
    whole = term._drawn(step.stages["stem"], step)
    step.batch.sample_ids = step.batch.sample_ids[2:3]
    assert torch.equal(term._drawn(step.stages["stem"][2:3], step), whole[2:3])
    assert whole.abs().max() <= 0.3


def test_smart_climbs_from_the_noise_within_its_radius() -> None:
    """One step against its formula, with dropout off; more steps find a worse change."""
    task, x = tiny()
    noisy = NoisyAgreement("stem", "middle", "photo", "multiclass", (1,), 0.1, "normal", seed=11)
    step = stepped(task, x, capture=("stem",))
    state = torch.get_rng_state()
    value = WorstAgreement(noisy, radius=0.15, step_size=0.2, steps=1)(step, task)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in task.parameters())

    def apart(change: Tensor) -> Tensor:
        b = task.heads["photo"](task.backbone.last(task.backbone.middle(step.stages["stem"].detach() + change)))
        a, b = step.logits["photo"].detach().log_softmax(1), b.log_softmax(1)
        return (a.exp() * (a - b) + b.exp() * (b - a)).sum(1)

    noise = noisy._drawn(step.stages["stem"], step).clamp(-0.15, 0.15).detach().requires_grad_()
    (g,) = torch.autograd.grad(apart(noise).sum(), noise)
    change = (noise + 0.2 * g / g.abs().amax(1, keepdim=True)).clamp(-0.15, 0.15)
    assert torch.allclose(value, apart(change)[1:4].mean(), atol=1e-6)
    values = [float(WorstAgreement(noisy, 0.15, 0.2, steps)(step, task)) for steps in (1, 4)]
    assert float(apart(noise)[1:4].mean()) < values[0] <= values[1]
    value.backward()
    assert task.backbone.stem[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("smart", [False, True], ids=["r3f", "smart"])
def test_noise_is_not_lost_in_mixed_precision(root: Path, smart: bool) -> None:
    """Both forwards run in float32 there: at 1e-4 a half would see no noise at all."""
    task, x = tiny()
    term = NoisyAgreement("stem", "middle", "photo", "multiclass", (1,), 1e-4, "normal", seed=11)
    term = WorstAgreement(term, 1e-4, 1e-3, 1) if smart else term
    plain = term(stepped(task, x, capture=("stem",)), task)
    other, _ = tiny()
    other.load_state_dict(task.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = stepped(other, x, capture=("stem",))
        mixed = term(step, other)
    assert step.logits["photo"].dtype == torch.bfloat16
    assert float(plain) > 0
    assert torch.allclose(mixed, plain, rtol=0.1)
    with pytest.raises(ConfigError, match="lost in half precision"):
        fit(data_of(root), {"r3f": SMART() if smart else R3F()}, precision="bf16-true")


def test_cotuning_translates_target_labels() -> None:
    """Row y of the relation is the mean source prediction over the rows of target label y."""
    z, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 3])
    table = relation(z, labels, 5)
    assert torch.allclose(table[1], z[2:5].softmax(1).mean(0))
    assert torch.allclose(table[2], torch.full((3,), 1 / 3))
    assert torch.allclose(table.sum(1), torch.ones(5))
    term = TranslatedLabels("photo", (1,), (5, 3))
    term.relation.copy_(table)
    logits = torch.randn(5, 3, requires_grad=True)
    step = make_step(torch.zeros(5, 2), DOMAINS, logits=logits, targets=[2, 1, 0, -1, -1])
    expected = (F.cross_entropy(logits[1:2], table[1:2]) + F.cross_entropy(logits[2:3], table[0:1])) / 3
    assert torch.allclose(term(step, None), expected, atol=1e-6)


def test_cotuning_reads_the_starting_model_once(root: Path) -> None:
    _, task = fit(data_of(root, target="art"), {"co": CoTuning()})
    table = task.attachments.terms["co"].relation
    assert table.shape == (3, 2)
    assert torch.allclose(table.sum(1), torch.ones(3))
    assert float((table - 0.5).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="shared label space"):
        fit(data_of(root), {"co": CoTuning()})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LwF(temperature=0.0), "temperature=0"),
        (lambda: BSS(k=0), "k=0"),
        (lambda: R3F(epsilon=0.0), "epsilon=0"),
        (lambda: SMART(sigma=0.0), "sigma=0"),
        (lambda: SMART(step_size=-1.0), "step_size=-1"),
        (lambda: SMART(steps=0), "steps=0"),
        (lambda: CoTuning(temperature=-1.0), "temperature=-1"),
        (lambda: DELTA(samples=0), "samples=0"),
        (lambda: DELTA(attention="best"), "attention='best'"),
        (lambda: LwF(rows="source").build(tiny()[0]), "rows='source'"),
    ],
)
def test_bad_settings_are_named(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def test_delta_needs_a_stage_after_those_it_weighs(root: Path) -> None:
    with pytest.raises(ConfigError, match="it is the last"):
        fit(data_of(root), {"delta": DELTA(stages=["last"])})
