"""Every method under half precision, per-domain statistics, phases and text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbones.tiny_models import tiny_text
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from retention_cases import CASES, data_of, fit, images
from tiny import TinyVision, flat, text_domains

from crossft.callbacks.averaging import EMA
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.retention import EWC, L2SP
from crossft.callbacks.retention.importance import Measure
from crossft.callbacks.retention.quadratic import QuadraticPenalty
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.tasks import Classification

TOGETHER = ["agem", "bss", "der", "drift", "ewc", "features-stages", "lwf", "mas", "mixout", "r3f", "si"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def trained(task: Classification, data: DomainData, methods: dict[str, Callback], **kwargs) -> Classification:
    for name, method in methods.items():
        method.name = name
    trainer = Trainer(
        **{"max_steps": 3, "limit_val_batches": 0, **kwargs},
        callbacks=list(methods.values()),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data)
    return task


def some(names: list[str]) -> dict[str, Callback]:
    return {n: CASES[n].make(0.1 * CASES[n].weight) for n in names}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_all_of_them_run_in_half_precision(root: Path, precision: str) -> None:
    task = fit(data_of(root, target="flipped"), {**some(TOGETHER), "ema": EMA(0.5)}, precision=precision)[1]
    assert torch.isfinite(flat(task)).all()
    importance = task.attachments.penalties["ewc"].importance_of("last.0.weight")
    assert importance.dtype == task.attachments.penalties["si"].path_of("last.0.weight").dtype == torch.float32
    single = fit(data_of(root, target="flipped"), some(["ewc"]), max_steps=1)[1].attachments.penalties["ewc"]
    assert float(importance.sum() / single.importance_of("last.0.weight").sum()) == pytest.approx(1, rel=0.05)


def test_what_is_small_is_kept_under_half_precision() -> None:
    penalty = QuadraticPenalty({"w": torch.nn.Parameter(torch.ones(2))})
    penalty.fill({"w": torch.tensor([1e-8, 1.0])}, {})
    weight = penalty.named["w"]
    assert penalty.half().importance_of("w").tolist() == pytest.approx([1e-8, 1.0])
    assert penalty.anchor_of("w").dtype == torch.float16
    weight.data = torch.full((2,), 1.5).half()
    penalty.add_grad_(1e6)
    assert weight.grad.tolist() == pytest.approx([5e-3, float("inf")], rel=1e-3)


def test_all_of_them_run_with_statistics_a_domain(root: Path) -> None:
    seed_everything(0, verbose=False)
    data = data_of(root, target="flipped")
    task = Classification(TinyVision(batchnorm=True), list(data.domains), batchnorm="per_domain")
    trained(task, data, {**some([n for n in TOGETHER if n != "r3f"]), "delta": CASES["delta"].make(1.0)})
    assert torch.isfinite(flat(task)).all()


def test_what_thaws_later_is_held_from_then_on(root: Path) -> None:
    """Importance is there for every weight that may train; the penalty acts on those that do."""
    seed_everything(0, verbose=False)
    data = data_of(root)
    task = Classification(TinyVision(), list(data.domains))
    task.thawing = frozenset({"stem", "middle"})
    trained(task, data, {"freeze": Freeze(train_last=1), "ewc": EWC(1000.0)})
    penalty = task.attachments.penalties["ewc"]
    assert float(penalty.importance_of("stem.1.weight").max()) > 0
    assert torch.equal(task.backbone.stem[1].weight, penalty.anchor_of("stem.1.weight"))
    held = penalty.value()
    task.train_stages(["stem", "middle", "last"])
    with torch.no_grad():
        task.backbone.stem[1].weight.add_(0.1)
    assert penalty.value() > held
    penalty.add_grad_(1.0)
    assert task.backbone.stem[1].weight.grad.abs().max() > 0


def test_all_of_them_run_on_text(tmp_path: Path) -> None:
    """Rows of unlike length in one batch: padding counts nowhere."""
    seed_everything(0, verbose=False)
    data = DomainData(
        text_domains(tmp_path / "data"), source="books", target="kitchen", batch_size=8, max_length=16, seed=1
    )
    data.prepare()
    backbone = tiny_text("bert", tmp_path / "bert")
    task = Classification(backbone, list(data.domains))
    names = [n for n in TOGETHER if n != "features-stages"]
    stages = [s.name for s in backbone.stages]
    methods = {**some(names), "features": CASES["features-stages"].make(1.0), "delta": CASES["delta"].make(1.0)}
    methods["features"].stages = (stages[0], stages[-1])
    trained(task, data, methods)
    assert torch.isfinite(flat(task)).all()
    assert float(task.attachments.penalties["ewc"].value()) > 0


@pytest.mark.parametrize("name", ["ewc", "mas", "lwf", "der"])
def test_what_holds_the_sources_head_needs_one_that_was_trained(root: Path, name: str) -> None:
    def start(*known: str) -> None:
        data = data_of(root)
        task = Classification(TinyVision(), list(data.domains))
        task.known_heads = frozenset(known)
        trained(task, data, some([name]))

    with pytest.raises(
        ConfigError, match=r"reads the head of photo.*, which nothing has trained yet: fit the source first"
    ):
        start()
    start("photo")


SHARDED = ["l2sp", "ewc", "online-ewc", "mas", "si", "mixout", "drift", "agem", "ema", "swa", "wiseft"]


@pytest.mark.parametrize("name", SHARDED)
def test_what_needs_whole_weights_refuses_a_strategy_that_cuts_them(root: Path, name: str) -> None:
    """It would hold tensors that no longer train, without a word."""
    data = data_of(root)
    task = Classification(TinyVision(), list(data.domains))
    method = CASES[name].make(CASES[name].weight)
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), datamodule=data)
    with pytest.raises(ConfigError, match=r"and trainer\.strategy \(ModelParallelStrategy\) cuts the weights"):
        method.setup(trainer, task, "fit")


class Tied(TinyVision):
    """Its last stage holds a matrix that the head uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.last.register_parameter("shared", torch.nn.Parameter(torch.zeros(2, 12)))


def test_a_weight_that_a_head_shares_is_the_heads(root: Path) -> None:
    data = data_of(root)
    task = Classification(Tied(), list(data.domains))
    data.bind(task.backbone.input_spec)
    for head in task.heads.values():
        head[1].weight = task.backbone.last.shared
    found = Measure(samples=4).run(task, data)
    assert "last.shared" not in found.values
    assert "last.0.weight" in found.values
    assert "last.shared" not in EWC().build(task).named
    assert all(p is not task.backbone.last.shared for p in L2SP().build(task)._shared)
