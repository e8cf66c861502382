"""Pseudo-labels and mean teacher: thresholds, clocks and which rows learn."""

from __future__ import annotations

import math

import pytest
import torch
from steps import built, make_step, make_task
from torch.nn import functional as F

from crossft.callbacks.adaptation import MeanTeacher, PseudoLabels
from crossft.errors import ConfigError

DOMAINS = [1, 0, -1, 0, 1, 1, 0, 1]  # target rows: 0, 4, 5, 7; the last has a label
TARGETS = [-1, 0, -1, 2, -1, -1, 1, 0]
LOGITS = torch.tensor(
    [
        [4.0, 0, 0],  # sure of class 0
        [0, 9, 0],
        [9, 0, 0],
        [0, 0, 9],
        [0.0, 0.5, 0],  # not sure
        [0, 0, 2.0],  # in between, class 2
        [9, 0, 0],
        [0, 9, 0],
    ],
    dtype=torch.float64,
)


def step(z: torch.Tensor, number: int = 0, progress: float = 0.5, targets=TARGETS):
    return make_step(torch.zeros(8, 12).double(), DOMAINS, logits=z, targets=targets, step=number, progress=progress)


def test_only_sure_unlabeled_target_rows_learn_their_own_class() -> None:
    z = LOGITS.clone().requires_grad_()
    term = built(PseudoLabels(threshold=0.9))
    loss = term(step(z), make_task())
    assert torch.allclose(loss, F.cross_entropy(z[:1], torch.tensor([0])) / 4)
    assert float(term.logs()["kept"]) == pytest.approx(1 / 4)
    gradient = torch.autograd.grad(loss, z)[0]
    assert (gradient[1:] == 0).all()


def test_without_a_threshold_it_is_lees() -> None:
    z = LOGITS.clone().requires_grad_()
    loss = built(PseudoLabels(threshold=0))(step(z), make_task())
    expected = F.cross_entropy(z[[0, 4, 5]], torch.tensor([0, 1, 2]), reduction="sum") / 4
    assert torch.allclose(loss, expected)


def test_the_ramp_is_linear_in_progress() -> None:
    ramped, full = built(PseudoLabels(threshold=0, ramp=0.5)), built(PseudoLabels(threshold=0))
    whole = float(full(step(LOGITS), make_task()))
    for progress, share in ((0.0, 0.0), (0.125, 0.25), (0.5, 1.0), (1.0, 1.0)):
        assert float(ramped(step(LOGITS, progress=progress), make_task())) == pytest.approx(share * whole)


def test_adaptive_thresholds_follow_the_steps_before() -> None:
    """tau <- m tau + (1-m) mean confidence, p~ <- m p~ + (1-m) mean prediction, tau_c = tau p~_c / max p~."""
    term = built(PseudoLabels(threshold="adaptive", balance=True, momentum=0.8))
    tau, marginal = 1 / 3, torch.full((3,), 1 / 3, dtype=torch.float64)
    p = LOGITS.softmax(1)[[0, 4, 5]]
    for number in range(4):
        assert torch.allclose(term.thresholds(), tau * marginal / marginal.max())
        term(step(LOGITS, number), make_task())
        before = term.thresholds()
        term(step(LOGITS, number), make_task())  # a second micro-batch sees the same thresholds
        assert torch.equal(term.thresholds(), before)
        if number:
            tau = 0.8 * tau + 0.2 * float(p.amax(1).mean())
            marginal = 0.8 * marginal + 0.2 * p.mean(0)
        assert torch.allclose(term.thresholds(), tau * marginal / marginal.max())


def test_balance_lowers_the_threshold_of_rare_classes() -> None:
    term = built(PseudoLabels(threshold=0.9, balance=True))
    term.marginal.copy_(torch.tensor([0.6, 0.32, 0.1]))
    assert torch.allclose(term.thresholds(), torch.tensor([0.9, 0.48, 0.15]).double())
    loss = term(step(LOGITS), make_task())
    expected = F.cross_entropy(LOGITS[[0, 5]], torch.tensor([0, 2]), reduction="sum") / 4
    assert torch.allclose(loss, expected)  # row 5 has 0.79 of class 2; row 4 has 0.45 of class 1


def test_fixed_thresholds_keep_no_running_means() -> None:
    term = built(PseudoLabels(threshold=0.9))
    before = {k: v.clone() for k, v in term.state_dict().items()}
    for number in range(3):
        term(step(LOGITS, number), make_task())
    assert all(torch.equal(before[k], v) for k, v in term.state_dict().items())


def teacher_and_step(number: int, task, targets=TARGETS, progress: float = 1.0):
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = task.backbone({"pixel_values": x}).features
    made = make_step(
        features, DOMAINS, logits=task.heads["photo"](features), targets=targets, step=number, progress=progress
    )
    made.batch.inputs = {"pixel_values": x}
    return made


def move(task) -> None:
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1)


def test_the_teacher_is_the_average_over_optimizer_steps() -> None:
    task = make_task().double()
    term = built(MeanTeacher(decay=0.6), task)
    average = [p.clone() for p in (*task.backbone.parameters(), *task.heads.parameters())]
    for number in range(4):
        for _ in range(2):  # two micro-batches: one update
            made = teacher_and_step(number, task)
            loss = term(made, task)
        if number:
            alpha = min(1 - 1 / (number + 1), 0.6)
            new = [*task.backbone.parameters(), *task.heads.parameters()]
            average = [alpha * a + (1 - alpha) * p for a, p in zip(average, new, strict=True)]
        held = [*term.backbone.parameters(), *term.head.parameters()]
        assert all(torch.allclose(a, b) for a, b in zip(held, average, strict=True))
        with torch.no_grad():
            teacher = term.head(term.backbone(made.batch.inputs).features).softmax(1)
        student = made.logits["photo"].softmax(1)
        expected = (student - teacher).square().mean(1)[[0, 4, 5]].sum() / 4
        assert torch.allclose(loss, expected, atol=1e-12)
        move(task)


def test_at_the_start_teacher_and_student_agree() -> None:
    task = make_task().double()
    assert built(MeanTeacher(), task)(teacher_and_step(0, task), task) == 0


def test_the_teacher_stays_in_evaluation_mode_and_never_trains() -> None:
    term = built(MeanTeacher())
    term.train()
    assert not any(m.training for m in term.modules())
    assert not any(p.requires_grad for p in term.parameters())


def test_the_ramp_and_the_confidence_of_the_teacher() -> None:
    task = make_task().double()
    term = built(MeanTeacher(ramp=0.5), task)
    move(task)
    whole = float(term(teacher_and_step(0, task, progress=0.5), task).detach())
    early = float(term(teacher_and_step(0, task, progress=0.1), task).detach())
    assert early == pytest.approx(whole * math.exp(-5 * 0.8**2))
    sure = built(MeanTeacher(threshold=0.99), task)
    assert sure(teacher_and_step(0, task), task) == 0
    assert sure.logs()["kept"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PseudoLabels(threshold=1.0), r"threshold=1\.0 must be in \[0, 1\), or 'adaptive'"),
        (lambda: PseudoLabels(threshold="high"), "threshold='high'"),
        (lambda: PseudoLabels(momentum=1.0), r"momentum=1\.0"),
        (lambda: PseudoLabels(ramp=2.0), r"ramp=2\.0"),
        (lambda: MeanTeacher(decay=1.0), r"decay=1\.0"),
        (lambda: MeanTeacher(ramp=-0.1), r"ramp=-0\.1"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
