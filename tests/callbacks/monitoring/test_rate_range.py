"""The learning-rate range test: its sweep, its losses, where it stops, and that it leaves the model as it was."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny import TinyVision, flat, image_domains

from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.monitoring import RateRange
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.tasks import Classification


class Watch(Callback):
    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.stem: list[torch.Tensor] = []
        self.start = torch.zeros(0)

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = flat(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % 2 == 0:
            self.rates.append({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups})
            self.losses.append(0.0)
        with torch.no_grad():
            step = pl_module.model_step(batch)
        self.losses[-1] += float(step.per_sample_loss.sum() / batch.labeled_quota) / 2
        self.stem.append(pl_module.backbone.stem[1].weight.detach().clone())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return image_domains(tmp_path_factory.mktemp("range") / "data", each=16)


def fit(root: Path, folder: Path, methods: list[Callback], epochs: int = 12, limit_val_batches: float = 0):
    seed_everything(3, verbose=False)
    data = DomainData(root=root, source="photo", target="sketch", batch_size=4, augment="none")
    data.prepare()
    task = Classification(
        TinyVision(), list(data.domains), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), layer_decay=0.5
    )
    trainer = Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, callbacks=methods, default_root_dir=folder, logger=False,
        enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=limit_val_batches, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, data)
    return trainer, task


def test_sweep_losses_and_suggestion(root: Path, tmp_path: Path) -> None:
    method, watch = RateRange(1e-2, 1e2, steps=30, smoothing=0.5, stop_at=1e9), Watch()
    trainer, task = fit(root, tmp_path, [Freeze(train_last=2), method, watch])
    assert trainer.global_step == len(method.losses) == 30
    own = {"stem": 0.0025, "middle": 0.005, "last": 0.01, "head.photo": 0.03}
    for step, rates in enumerate(watch.rates):
        factor = 1e-2 * 1e4 ** (step / 29)
        assert method.factors[step] == pytest.approx(factor)
        assert rates == pytest.approx({n: own[n.split("/")[0]] * factor for n in rates})
    assert method.losses == pytest.approx(watch.losses, rel=1e-5)
    average, smoothed = 0.0, []
    for i, loss in enumerate(watch.losses):
        average = 0.5 * average + 0.5 * loss
        smoothed.append(average / (1 - 0.5 ** (i + 1)))
    assert method.smoothed == pytest.approx(smoothed, rel=1e-5)
    assert method.suggestion == method.factors[10 + int(np.gradient(np.array(method.smoothed[10:-1])).argmin())]
    assert all(torch.equal(watch.stem[0], w) for w in watch.stem)  # frozen stages take no part
    assert torch.equal(flat(task), watch.start)
    with (tmp_path / "lr_range.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in rows] == method.losses
    assert (tmp_path / "lr_range.png").read_bytes()[:4] == b"\x89PNG"


def test_it_stops_where_the_loss_diverges(root: Path, tmp_path: Path) -> None:
    method, watch = RateRange(1e3, 1e9, steps=30, smoothing=0.0, stop_at=2.0), Watch()
    trainer, task = fit(root, tmp_path, [method, watch])
    assert trainer.global_step < 30
    assert not method.losses[-1] <= 2 * min(method.losses)
    assert all(a <= 2 * min(method.losses[: i + 1]) for i, a in enumerate(method.losses[:-1]))
    assert torch.equal(flat(task), watch.start)


@pytest.mark.parametrize(
    "bad", [{"lowest": 0.0}, {"highest": 1e-4}, {"steps": 1}, {"stop_at": 1.0}, {"smoothing": 1.0}]
)
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RateRange(**bad)


def test_what_does_not_fit_the_run_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps=30 needs a new run.*goes from 0 to 3"):
        fit(root, tmp_path, [RateRange(steps=30)], epochs=1)
    phases = GradualUnfreezing([Phase(train_last=0, steps=2), Phase()])
    for methods in ([phases, RateRange(steps=3, phase=2)], [RateRange(steps=3, phase=2), phases]):
        with pytest.raises(ConfigError, match=r"phase=2 must be between 0 and 1: methods\.unfreeze has 2 phases"):
            fit(root, tmp_path, methods)
    with pytest.raises(ConfigError, match="phase=1: no method of this run has phases"):
        fit(root, tmp_path, [RateRange(steps=3, phase=1)])


class Moved(Callback):
    """Stages that a fit has moved, seen at its end, before anything is put back."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        moved = {n for n, p in pl_module.named_parameters() if not torch.equal(p, self.start[n])}
        self.stages = {n.split(".")[1] for n in moved}


@pytest.mark.parametrize("first", [True, False], ids=["phases-first", "range-first"])
@pytest.mark.parametrize("phase", [0, 1, 2])
def test_one_phase_is_tested_in_either_order(root: Path, tmp_path: Path, phase: int, first: bool) -> None:
    """The phases' own ends, rates and schedule take no part; afterwards they follow one another as ever."""
    plan = [
        Phase(train_last=0, steps=2, lr=0.1),
        Phase(train=["middle"], steps=2, rates="rewarm", warmup=2),
        Phase(rates="restart"),
    ]
    phases, method, watch, moved = (
        GradualUnfreezing(plan),
        RateRange(1e-2, 1e2, steps=12, phase=phase),
        Watch(),
        Moved(),
    )
    order = [phases, method] if first else [method, phases]
    trainer, task = fit(root, tmp_path, [*order, watch, moved])
    assert trainer.global_step == len(method.losses) == 12
    assert moved.stages == {"photo", *[(), ("middle",), ("stem", "middle", "last")][phase]}
    own = {"stem": 0.0025, "middle": 0.005, "last": 0.01, "head.photo": 0.03}
    for step, rates in enumerate(watch.rates):
        factor = 1e-2 * 1e4 ** (step / 11)
        assert rates == pytest.approx({n: own[n.split("/")[0]] * factor for n in rates})
    assert torch.equal(flat(task), watch.start)
    assert (tmp_path / "lr_range.png").read_bytes()[:4] == b"\x89PNG"
    assert not any(p.requires_grad for p in task.backbone.parameters())  # back in the first phase
    assert getattr(task.schedule, "sweep", task.schedule) is not method.sweep
    trainer, task = fit(root, tmp_path, [phases])
    assert phases.index == 2
    assert trainer.global_step == 12 * 3


def test_a_patient_last_phase_does_not_end_the_sweep(root: Path, tmp_path: Path) -> None:
    phases = GradualUnfreezing([Phase(train_last=0, patience=1), Phase(patience=1)], monitor="never/measured")
    method = RateRange(steps=12, phase=1)
    trainer, _ = fit(root, tmp_path, [method, phases], limit_val_batches=1.0)
    assert trainer.global_step == 12
