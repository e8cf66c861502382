"""The ledger of a fit with phases, its resume, and the learning rates that a dry run foretells."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from test_gradual import Trace, fit
from tiny import TinyVision, image_domains

from crossft.callbacks.freezing import GradualUnfreezing, Phase
from crossft.callbacks.freezing.course import Course
from crossft.callbacks.freezing.selection import Selection
from crossft.callbacks.monitoring import Ledger, ledger_rows
from crossft.cli.costs import full_cost, step_cost
from crossft.cli.curves import draw_rates, dry_rates, lines_of
from crossft.optim import Cosine
from crossft.tasks import Classification
from crossft.types import Domain

PLAN = [
    Phase(train_last=0, epochs=1),
    Phase(train=["middle"], steps=4, rates="rewarm", warmup=2, lr=0.5),
    Phase(rates="restart"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("ledger")
    root = image_domains(folder / "data", each=16)
    trace = Trace()
    trainer, _ = fit(root, [GradualUnfreezing(PLAN), trace, Ledger(folder / "run")], folder / "run")
    return root, folder / "run", trace, trainer


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_ledger_has_every_stage_of_every_phase(run) -> None:
    _, folder, trace, _ = run
    rows = read(folder / "ledger.csv")
    assert [r["stage"] for r in rows] == ["stem", "middle", "last", "head.photo"] * 3
    starts = [trace.phases.index(i) for i in range(3)]
    assert [int(r["step"]) for r in rows[::4]] == starts
    assert [r["mode"] for r in rows] == [
        *("frozen", "frozen", "frozen", "train"),
        *("frozen", "train", "frozen", "train"),
        *("train", "train", "train", "train"),
    ]
    assert [int(r["trainable"]) for r in rows[4:8]] == [0, 12 * 12 + 12 + 24, 0, 26]
    assert [r["batchnorm"] for r in rows if r["stage"] == "middle"] == ["frozen", "training", "training"]
    assert {r["batchnorm"] for r in rows if r["stage"] != "middle"} == {""}
    for row in rows:
        step, name = int(row["step"]), row["stage"]
        base = 3e-4 * (3.0 if name.startswith("head") else 1.0)
        assert float(row["lr"]) == pytest.approx(base * trace.rates[step][f"{name}/decay"])


def test_a_resumed_run_writes_the_same_ledger(run, tmp_path: Path) -> None:
    root, folder, _, _ = run
    for step in (2, 3, 5):
        again = tmp_path / str(step)
        path = folder / "checkpoints" / f"step-{step}.ckpt"
        fit(root, [GradualUnfreezing(PLAN), Trace(), Ledger(again)], again, path)
        assert (again / "ledger.csv").read_bytes() == (folder / "ledger.csv").read_bytes()


def test_the_dry_run_foretells_every_groups_learning_rate(run, tmp_path: Path) -> None:
    _, _, trace, trainer = run
    domains = [Domain("photo", "source", labels=("cat", "dog")), Domain("sketch", "target", labels=("cat", "dog"))]
    task = Classification(TinyVision(batchnorm=True), domains, schedule=Cosine(warmup=2))
    total = trainer.global_step
    rates = dry_rates(task, PLAN, Course(total, int(trainer.num_training_batches), 2))
    for step in range(total):
        for name, ratio in trace.rates[step].items():
            base = 3e-4 * (3.0 if name.startswith("head") else 1.0)
            trains = (
                name.startswith("head") or (name.startswith("middle") and trace.phases[step]) or trace.phases[step] == 2
            )
            expected = base * ratio if trains else math.nan
            assert rates[name][step] == pytest.approx(expected, nan_ok=True), (name, step)
    assert draw_rates(rates, tmp_path / "a" / "rates.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curve_has_a_line_for_every_group_and_one_label_where_two_coincide() -> None:
    domains = [Domain("photo", "source", labels=("a", "b"))]
    task = Classification(TinyVision(batchnorm=True), domains, schedule=Cosine(warmup=2))
    course = Course(total=8, batches=4)
    both = lines_of(dry_rates(task, [Phase(train_last=1, epochs=1), Phase(kinds=["bias"])], course))
    assert list(both) == [
        *("stem/decay (never trains)", "stem/no_decay", "middle/decay (never trains)", "middle/no_decay"),
        *("last/decay", "last/no_decay", "head.photo"),
    ]
    assert [math.isnan(v) for v in both["last/decay"]] == [False] * 4 + [True] * 4
    assert not any(map(math.isnan, both["last/no_decay"]))
    assert [math.isnan(v) for v in both["stem/no_decay"]] == [True] * 4 + [False] * 4
    task.train_stages(["last"])
    frozen = ["stem (never trains)", "middle (never trains)", "last", "head.photo"]
    assert list(lines_of(dry_rates(task, [], course))) == frozen


def test_rows_of_a_task_as_it_is() -> None:
    domains = [Domain("photo", "source", labels=("a", "b"))]
    task = Classification(TinyVision(), domains, layer_decay=0.5)
    task.train_stages(["last"])
    rows = ledger_rows(task, task.named_groups())
    assert [(r["stage"], r["lr"], r["trainable"] > 0) for r in rows] == [
        ("stem", 7.5e-5, False),
        ("middle", 1.5e-4, False),
        ("last", 3e-4, True),
        ("head.photo", pytest.approx(9e-4), True),
    ]

    def modes() -> list[str]:
        return [row["mode"] for row in ledger_rows(task, task.named_groups())]

    assert modes() == ["frozen", "frozen", "train", "train"]
    task.backbone.train()  # against what was set: the ledger says what is
    assert modes() == ["train"] * 4
    task.eval()
    assert modes() == ["frozen", "frozen", "eval", "eval"]


def test_the_cost_of_a_step_counts_what_the_backward_pass_reaches() -> None:
    """A linear layer a -> b costs 2ab a row, forward, for its weight's gradient, and for its input's."""
    task = Classification(TinyVision(batchnorm=True), [Domain("photo", "source", labels=("a", "b"))]).train()
    state = {k: v.clone() for k, v in task.state_dict().items()}
    stem, inner, head = 2 * 192 * 12, 2 * 12 * 12, 2 * 12 * 2
    forward = stem + 2 * inner + head
    full = (forward, forward + 2 * inner + head)  # the first layer needs no gradient of its input
    expected = {0: head, 1: head + inner + head, 2: head + 2 * inner + inner + head, 3: full[1]}
    for depth, backward in expected.items():
        Selection(train_last=depth).apply(task)
        assert full_cost(task) == full
        assert step_cost(task) == (forward, backward), depth
    assert all(torch.equal(v, state[k]) for k, v in task.state_dict().items())
    assert task.training
    assert all(p.grad is None for p in task.parameters())
