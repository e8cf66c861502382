"""Phases: their plans, their ends, what becomes of the optimizer, and resuming within each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tiny import TinyVision, flat, image_domains

from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.freezing.phases import check_plan, planned_steps, thawing
from crossft.callbacks.freezing.wrapping import refuse_fused, refuse_unwrappable
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, load_checkpoint
from crossft.data import DomainData
from crossft.errors import CheckpointError, ConfigError, StageError, TrainingError
from crossft.optim import Cosine, Linear, Plateau
from crossft.tasks import Classification

PHASES = [
    Phase(train_last=0, steps=2),
    Phase(train_last=1, patience=1, rates="rewarm", warmup=2, restore_best=True),
    Phase(train=["middle"], share=0.2, moments="reset", lr=0.5),
    Phase(patience=2, rates="restart"),
]


class Trace(Callback):
    """Learning rates, phase and optimizer state sizes at the start of every optimizer step; a metric by script."""

    def __init__(self, scores: list[float] | None = None) -> None:
        self.rates: list[dict[str, float]] = []
        self.phases: list[int] = []
        self.moments: list[int] = []
        self.trainable: list[int] = []
        self.scores = scores

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if self.scores is not None:
            pl_module.log("scripted", torch.tensor(self.scores[trainer.current_epoch]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            groups = trainer.optimizers[0].param_groups
            self.rates.append({g["name"]: g["lr"] / g["initial_lr"] for g in groups})
            method = next(c for c in trainer.callbacks if isinstance(c, GradualUnfreezing))
            self.phases.append(method.index)
            self.moments.append(len(trainer.optimizers[0].state))
            self.trainable.append(sum(p.requires_grad for p in pl_module.backbone.parameters()))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return image_domains(tmp_path_factory.mktemp("gradual") / "data", each=16)


def fit(root: Path, methods: list[Callback], folder: Path | None = None, resume: Path | None = None, **kwargs):
    seed_everything(7, verbose=False)
    data = DomainData(root=root, source="photo", target="sketch", batch_size=4, augment="none", seed=7)
    data.prepare()
    options = {"schedule": kwargs.pop("schedule", Cosine(warmup=2)), "layer_decay": kwargs.pop("layer_decay", 1.0)}
    backbone = kwargs.pop("backbone", None) or TinyVision(dropout=0.3, batchnorm=True)
    options["batchnorm"] = kwargs.pop("batchnorm", "training")
    task = Classification(backbone, list(data.domains), **options)
    saving = [Checkpoints(folder, every_n_steps=1, keep=100)] if folder else []
    trainer = Trainer(
        **{"max_epochs": 4, "accumulate_grad_batches": 2, **kwargs},
        callbacks=[*methods, *saving],
        plugins=[AtomicCheckpointIO()] if folder else [],
        logger=False,
        enable_checkpointing=bool(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return trainer, task


def unfreezing() -> GradualUnfreezing:
    return GradualUnfreezing(PHASES, monitor="scripted")


SCORES = [0.5, 0.4, 0.3, 0.6, 0.2, 0.1, 0.0]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trace = Trace(SCORES)
    trainer, task = fit(root, [unfreezing(), trace], folder, max_epochs=7, schedule=Plateau("scripted", "max", 0.5, 1))
    return folder, trace, trainer, task


def test_every_phase_ends_where_it_says(whole) -> None:
    """Two steps; one validation without improvement (the second); a fifth of 14 steps; two validations, then stop."""
    _, trace, trainer, _ = whole
    steps = trainer.num_training_batches // 2
    assert int(trainer.estimated_stepping_batches) == 7 * steps
    assert trace.phases[:2] == [0, 0]
    patient = 2 * steps - 2  # the first validation is the best, the second ends it
    share = round(0.2 * 7 * steps)
    assert trace.phases[: 2 + patient + share] == [0] * 2 + [1] * patient + [2] * share
    assert set(trace.phases[2 + patient + share :]) == {3}
    stopped = trainer.global_step
    assert stopped == len(trace.phases)
    assert stopped < 7 * steps
    assert [n for i, n in enumerate(trace.trainable) if i in (0, 2, 2 + patient, stopped - 1)] == [0, 2, 4, 8]


def test_moments_are_kept_or_reset(whole) -> None:
    _, trace, _, _ = whole
    third = trace.phases.index(2)
    assert trace.moments[third - 1] == 4  # head and last stage
    assert trace.moments[third] == 0
    assert trace.moments[trace.phases.index(3)] == 6  # head and middle
    assert trace.moments[-1] == 10


def equal(a, b, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def test_resume_from_every_checkpoint_is_bit_equal(whole, root: Path, tmp_path: Path) -> None:
    """Weights, moments, rates, buffers, the plateau's state and the phase; from every step of every phase."""
    folder, trace, trainer, _ = whole
    final = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    saved = sorted((folder / "checkpoints").glob("step-*.ckpt"), key=lambda p: int(p.stem.split("-")[1]))
    assert len(saved) == trainer.global_step
    for path in saved:
        start = int(path.stem.split("-")[1])
        again = Trace(SCORES)
        run = tmp_path / str(start)
        other, _ = fit(
            root, [unfreezing(), again], run, path, max_epochs=7, schedule=Plateau("scripted", "max", 0.5, 1)
        )
        assert again.rates == trace.rates[start:], start
        assert again.phases == trace.phases[start:], start
        assert again.trainable == trace.trainable[start:], start
        assert other.global_step == trainer.global_step
        if start < trainer.global_step:
            mine = load_checkpoint(run / "checkpoints" / "last.ckpt")
            for part in ("state_dict", "optimizer_states", "lr_schedulers", "schedule", "callbacks", "global_step"):
                equal(final[part], mine[part], f"from step {start}: {part}")


def test_best_weights_come_back_at_the_end_of_a_phase(root: Path) -> None:
    class Keep(Callback):
        def __init__(self) -> None:
            self.ends: list[torch.Tensor] = []
            self.begins: list[torch.Tensor] = []

        def on_validation_end(self, trainer, pl_module) -> None:
            self.ends.append(flat(pl_module))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0:
                self.begins.append(flat(pl_module))

    keep = Keep()
    method = GradualUnfreezing(
        [Phase(train_last=1, epochs=3, restore_best=True), Phase()], monitor="scripted", mode="min"
    )
    fit(root, [method, Trace([0.9, 0.1, 0.5, 0.0]), keep])
    assert torch.equal(keep.begins[3], keep.ends[1])
    assert not torch.equal(keep.ends[2], keep.ends[1])
    assert torch.equal(keep.begins[1], keep.ends[0])


def test_rates_per_group_follow_closed_forms_where_stages_thaw(root: Path) -> None:
    trace = Trace()
    plan = [
        Phase(train_last=1, epochs=1),
        Phase(train_last=2, epochs=1, rates="rewarm", warmup=3, lr=0.5),
        Phase(epochs=1, rates="restart"),
        Phase(),
    ]
    trainer, _ = fit(root, [GradualUnfreezing(plan), trace], schedule=Linear(warmup=2))
    n, total, base = trainer.num_training_batches // 2, trainer.global_step, Linear(warmup=2)
    expected = [base(s, total) for s in range(n)]
    expected += [0.5 * min(1.0, (s - n + 1) / 4) * base(s, total) for s in range(n, 2 * n)]
    expected += [base(s, n) for s in range(n)]
    expected += [base(s, total) for s in range(3 * n, total)]
    for step, rates in enumerate(trace.rates):
        assert len(rates) == 8
        assert list(rates.values()) == pytest.approx([expected[step]] * 8), step


def test_plans_stage_by_stage() -> None:
    plan = thawing(Phase(epochs=2, moments="reset"), 5, 1, 2)
    assert [p.train_last for p in plan] == [1, 3, 5]
    assert [p.epochs for p in plan] == [2, 2, None]
    assert all(p.moments == "reset" for p in plan)
    assert [p.patience for p in thawing(Phase(patience=3), 2, 0, 1)] == [3, 3, 3]
    assert planned_steps(Phase(share=0.25), 10, 100, 7) == 25
    assert planned_steps(Phase(epochs=2), 10, 100, 7) == 11
    assert planned_steps(Phase(steps=500), 10, 100, 7) == planned_steps(Phase(), 10, 100, 7) == 90


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(epochs=1, steps=1), "epochs and steps"),
        (lambda: Phase(epochs=0), "epochs=0"),
        (lambda: Phase(share=1.0), "share=1.0"),
        (lambda: Phase(lr=0.0), "lr=0.0"),
        (lambda: Phase(rates="rewarm"), "needs warmup"),
        (lambda: Phase(warmup=3), "only rewarm reads it"),
        (lambda: Phase(rates="again"), "'again' is unknown"),
        (lambda: Phase(moments="half"), "'half' is unknown"),
        (lambda: GradualUnfreezing(), "exactly one of phases"),
        (lambda: GradualUnfreezing(every=Phase()), "every has no length"),
        (lambda: GradualUnfreezing([Phase()]), "at least 2"),
        (lambda: GradualUnfreezing([Phase(), Phase()]), r"phases\[0\] has no end"),
        (lambda: GradualUnfreezing([Phase(steps=1), Phase(steps=1)]), "the last phase has steps"),
        (lambda: GradualUnfreezing([Phase(share=0.6), Phase(share=0.5), Phase()]), "add up to 1"),
        (lambda: GradualUnfreezing([Phase(patience=1), Phase()]), "monitor"),
        (lambda: check_plan([Phase(steps=1), Phase(restore_best=True)], "x"), "set select"),
        (lambda: thawing(Phase(train_last=1, epochs=1), 3, 0, 1), "set by first and by"),
        (lambda: thawing(Phase(epochs=1), 3, 3, 1), "first=3"),
        (lambda: thawing(Phase(epochs=1), 3, 0, 0), "by=0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_cannot_be_right_is_refused_before_training(root: Path, whole) -> None:
    folder, *_ = whole
    with pytest.raises(StageError, match="'midle'; nearest: middle"):
        fit(root, [GradualUnfreezing([Phase(train_last=0, epochs=1), Phase(train=["midle"])])])
    with pytest.raises(TrainingError, match="second method"):
        fit(root, [Freeze(train_last=1), GradualUnfreezing(every=Phase(epochs=1))])
    path = folder / "checkpoints" / "step-3.ckpt"
    with pytest.raises(CheckpointError, match="4 phases"):
        fit(root, [GradualUnfreezing([Phase(steps=1), Phase()]), Trace()], folder, path)

    class Stub:
        def __init__(self, kind: type) -> None:
            self.strategy = kind.__new__(kind)

    for kind, word in ((DeepSpeedStrategy, "fuses"), (FSDPStrategy, "flattens")):
        for refuse in (refuse_fused, refuse_unwrappable):
            with pytest.raises(ConfigError, match=word):
                refuse(Stub(kind), "unfreeze")
