"""Drift on numbers: distances and CKA by hand, ratios by autograd, and a run that is not moved by being watched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from retention_cases import data_of, fit, images
from tiny import flat
from torch import nn

from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.monitoring import Drift, stage_drift
from crossft.callbacks.monitoring.drift import StartingWeights
from crossft.callbacks.retention import EWC, L2SP, LwF
from crossft.errors import ConfigError
from crossft.functional import linear_cka
from crossft.types import Stage


def test_distance_and_angle_by_hand() -> None:
    start = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    now = [nn.Parameter(torch.tensor([3.0, 12.0])), nn.Parameter(torch.tensor([4.0]))]
    found = stage_drift(start, now)
    assert float(found["l2"]) == 12.0
    assert float(found["relative"]) == pytest.approx(12 / 5)
    assert float(found["cosine"]) == pytest.approx(25 / (5 * 13))


def test_starting_weights_come_back_to_the_bit_and_what_is_double_is_compared_so(tmp_path: Path) -> None:
    parameters = [
        nn.Parameter(torch.randn(3, 5, dtype=torch.float64)),
        nn.Parameter(torch.randn(4).bfloat16()),
        nn.Parameter(torch.empty(0, 2)),
        nn.Parameter(torch.tensor(2.0)),
    ]
    holder = nn.Module()
    holder.all = nn.ParameterList(parameters)
    kept = StartingWeights([Stage("one", (holder,))], tmp_path / "new")
    assert not list((tmp_path / "new").iterdir()), "the file has no name"
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        parameters[0].add_(1e-9)
    for _ in range(2):
        found = list(kept.of("one"))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, before, strict=True))
    assert float(stage_drift(kept.of("one"), parameters)["l2"]) == pytest.approx(15**0.5 * 1e-9, rel=1e-3)
    kept.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept in"):
        StartingWeights([Stage("one", (holder,))], tmp_path / "file")


def test_cka_is_that_of_the_paper_and_blind_to_rotation_shift_and_scale() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, d, generator=g, dtype=torch.float64) for d in (5, 7))
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert float(linear_cka(x, y)) == pytest.approx(float(expected))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    assert float(linear_cka(x, 3 * x @ turn + 2)) == pytest.approx(1.0)
    assert float(linear_cka(x, y)) < 0.9


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name, version = "kept", "0"

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def named(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows if name in row}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


class Reads(Drift):
    """Notes the gradients before penalties, the weights at the start, and the penalties' own gradients by hand."""

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        self.before = [None if p.grad is None else p.grad.clone() for p in task.parameters()]
        super().on_before_optimizer_step(trainer, task, optimizer)
        after = [p.grad for p in task.parameters()]
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(after, self.before, strict=True))
        self.ratio = {}
        for name, penalty in task.attachments.penalties.items():
            pulls, grads = [], []
            for n, p in task.backbone.named_parameters():
                if n in penalty.named and p.requires_grad:
                    pulls.append(penalty.importance_of(n) * (p.detach() - penalty.anchor_of(n)))
                    grads.append(p.grad)
            top, bottom = (torch.cat([t.flatten() for t in side]).norm() for side in (pulls, grads))
            self.ratio[name] = task.attachments.weights[name] * float(top / bottom)


def test_watching_logs_what_there_is_and_moves_nothing(root: Path) -> None:
    methods = lambda: {"ewc": EWC(50.0), "lwf": LwF()}  # noqa: E731
    plain = fit(data_of(root), methods(), dropout=0.3)[1]
    kept, drift = Kept(), Reads(rows=10, every_n_steps=2)
    task = fit(data_of(root), methods(), dropout=0.3, extra=(drift,), logger=kept)[1]
    assert torch.equal(flat(plain), flat(task))
    ratios = kept.named("term/ewc/ratio")
    assert sorted(ratios) == [0, 1, 2, 3]
    assert ratios[0] == 0.0
    assert ratios[3] == pytest.approx(drift.ratio["ewc"], rel=1e-4)
    assert ratios[3] > 0
    for stage in ("stem", "middle", "last"):
        far = kept.named(f"drift/{stage}/l2")
        assert sorted(far) == [1, 3]
        assert 0 < far[1] < far[3]
        assert 0 < kept.named(f"drift/{stage}/cosine")[3] < 1
    ewc = task.attachments.penalties["ewc"]
    start = [ewc.anchor_of(n) for n, _ in task.backbone.last.named_parameters(prefix="last")]
    now = list(task.backbone.last.parameters())
    assert kept.named("drift/last/l2")[3] == pytest.approx(float(stage_drift(start, now)["l2"]))
    cka = kept.named("drift/features/cka")
    assert 0 < cka[3] < cka[1] < 1
    assert set(kept.named("source/probe/accuracy")) == {1, 3}


def test_stored_prefixes_change_nothing_that_is_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path))

    def logged(*cache: PrefixCache) -> dict[tuple[int, str], float]:
        kept, drift = Kept(), Drift(rows=10, every_n_steps=2)
        methods = {"freeze": Freeze(train_last=1), "ewc": EWC(50.0), "lwf": LwF()}
        fit(data_of(root), methods, extra=(drift, *cache), logger=kept)
        return {
            (step, k): v
            for step, row in kept.rows
            for k, v in row.items()
            if k.startswith(("drift/", "term/", "source/"))
        }

    plain = logged()
    assert plain == pytest.approx(logged(PrefixCache()), rel=1e-4, abs=1e-6)
    assert {"drift/features/cka", "drift/last/l2", "term/ewc/ratio", "source/probe/accuracy"} <= {k for _, k in plain}
    assert list(tmp_path.rglob("*.json")), "prefixes were stored"


def test_the_probe_is_the_sources_accuracy_on_its_rows(root: Path) -> None:
    kept = Kept()
    data = data_of(root, splits=(0.5, 0.3, 0.2))
    trainer, task = fit(
        data, {"l2sp": L2SP()}, extra=(Drift(rows=1000, every_n_steps=4),), logger=kept, limit_val_batches=1.0
    )
    measured = trainer.validate(task, data, verbose=False)
    accuracy = {k: v for row in measured for k, v in row.items()}["source/val/accuracy"]
    assert kept.named("source/probe/accuracy")[3] == pytest.approx(accuracy, abs=1e-6)
    assert math.isfinite(kept.named("term/l2sp/ratio")[3])


def test_bad_settings_are_named() -> None:
    for make, match in ((lambda: Drift(rows=-1), "rows=-1"), (lambda: Drift(every_n_steps=0), "every_n_steps=0")):
        with pytest.raises(ConfigError, match=match):
            make()
