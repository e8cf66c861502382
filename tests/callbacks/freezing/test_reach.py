"""Whether a run can enter its last phase: known when training starts, and said at its end."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_gradual import fit
from tiny import image_domains

from crossft.callbacks.freezing import GradualUnfreezing, Phase
from crossft.callbacks.freezing.course import Course, check_reach, course_of, earliest_starts
from crossft.errors import ConfigError


class Seen(Callback):
    """Validations that have run before each optimizer step, and the phases' first steps; the metric never moves."""

    def __init__(self, score: float | None = 0.5) -> None:
        self.score = score
        self.course: Course | None = None
        self.validations: list[int] = []
        self.starts: list[int] = []
        self.count = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.course = course_of(trainer)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.count += 1
        pl_module.log("scripted", torch.tensor(self.score))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.validations.append(self.count)
            method = next(c for c in trainer.callbacks if isinstance(c, GradualUnfreezing))
            if method.index == len(self.starts):
                self.starts.append(trainer.global_step)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("reach") / "data", each=16)


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"accumulate_grad_batches": 1, "val_check_interval": 0.34},
        {"val_check_interval": 1, "max_steps": 7},
        {"check_val_every_n_epoch": 2, "val_check_interval": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 4, "max_epochs": 6},
    ],
    ids=["epochs", "thirds", "batches", "every second epoch", "over epochs"],
)
def test_the_course_foretells_validations_and_the_earliest_starts(root: Path, trainer: dict) -> None:
    """Against fits whose metric stands still, so that every phase ends as early as it can."""
    seen = Seen()
    plan = [Phase(train_last=0, steps=1), Phase(train_last=1, patience=1), Phase()]
    fit(root, [GradualUnfreezing(plan, monitor="scripted"), seen], **trainer)
    assert seen.course is not None
    assert seen.course.total == len(seen.validations)
    assert [seen.course.validations(step) for step in range(seen.course.total)] == seen.validations
    assert earliest_starts(plan, seen.course) == seen.starts
    assert len(seen.starts) == 3


def test_earliest_starts_by_hand() -> None:
    course = Course(total=40, batches=10)
    assert earliest_starts([Phase(epochs=1), Phase(steps=5), Phase(epochs=2), Phase()], course) == [0, 10, 15, 30]
    assert earliest_starts([Phase(share=0.25), Phase(patience=1), Phase()], course) == [0, 10, 30]
    assert earliest_starts([Phase(patience=1), Phase(patience=1), Phase()], course) == [0, 20]
    assert earliest_starts([Phase(patience=9), Phase()], Course(10, 10, val_batches=1)) == [0]
    assert earliest_starts([Phase(patience=8), Phase()], Course(10, 10, val_batches=1)) == [0, 9]
    assert earliest_starts([Phase(patience=1), Phase()], Course(40, 10, val_batches=0)) == [0]
    assert earliest_starts([Phase(steps=39), Phase()], course) == [0, 39]
    assert earliest_starts([Phase(steps=40), Phase()], course) == [0]
    with pytest.raises(ConfigError, match=r"methods\.x: the last of 2 phases is never entered: phase 0 .* step 0 at"):
        check_reach([Phase(steps=40), Phase()], course, "x")


@pytest.mark.parametrize(
    ("make", "trainer", "message"),
    [
        (lambda: GradualUnfreezing([Phase(train_last=0, steps=1000), Phase()]), {"max_epochs": 2}, "last of 2 phases"),
        (lambda: GradualUnfreezing(every=Phase(epochs=1), first=1), {"max_epochs": 2}, r"last of 3 .*trainer\.max_ep"),
        (lambda: GradualUnfreezing([Phase(train_last=0, epochs=2), Phase()]), {"max_steps": 5}, "has 5 optimizer"),
        (
            lambda: GradualUnfreezing([Phase(train_last=0, share=0.5), Phase(train_last=1, epochs=3), Phase()]),
            {},
            "phase 1 .* begins at optimizer step 6 at the earliest",
        ),
        (
            lambda: GradualUnfreezing(every=Phase(patience=2), monitor="scripted"),
            {"max_epochs": 1},
            r"0 validations before its last step, .* take 9 .*trainer\.val_check_interval",
        ),
        (lambda: GradualUnfreezing(every=Phase(patience=1), monitor="scripted"), {"limit_val_batches": 0}, "and 0 val"),
    ],
    ids=["steps", "epochs", "max_steps", "share", "patience", "no validation"],
)  # fmt: skip
def test_a_last_phase_that_is_never_entered_is_refused_when_training_starts(
    root: Path, make, trainer: dict, message: str
) -> None:
    method = make()
    seen = Seen()
    with pytest.raises(ConfigError, match=message):
        fit(root, [method, seen], **trainer)
    assert not seen.validations


def test_a_run_that_is_cut_short_on_purpose_is_not_refused(root: Path) -> None:
    method = GradualUnfreezing(every=Phase(patience=2), monitor="scripted")
    method.whole = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never entered")
        fit(root, [method], max_steps=2, limit_val_batches=0)
        fit(root, [GradualUnfreezing(every=Phase(epochs=1))], fast_dev_run=True)


def test_phases_that_were_never_entered_are_named_at_the_end(root: Path) -> None:
    class Better(Seen):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            self.score = float(trainer.current_epoch)
            super().on_validation_epoch_end(trainer, pl_module)

    plan = [Phase(train_last=0, patience=1), Phase(train_last=1, steps=1), Phase()]
    with pytest.warns(UserWarning, match=r"ended in phase 0 of 3 .* step 12; never entered: phase 1, 2\. What thaws"):
        fit(root, [GradualUnfreezing(plan, monitor="scripted"), Better()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never entered")
        fit(root, [GradualUnfreezing(plan, monitor="scripted"), Seen()])
