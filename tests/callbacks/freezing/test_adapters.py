"""Adapters in a fit: alone, beside Freeze, and through phases; resumed from every step."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_gradual import equal, fit
from tiny import TinyVision, flat, image_domains

from crossft.backbones import Adapted
from crossft.backbones.adapted import is_adapter
from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.monitoring import Ledger, load_checkpoint

pytest.importorskip("peft")
PHASES = [
    Phase(train_last=0, steps=2),
    Phase(kinds=["adapter"], steps=3, rates="rewarm", warmup=1),
    Phase(rates="restart", moments="reset", lr=0.5),
]


def adapted(kind: str = "lora", stages: list[str] | None = None) -> Adapted:
    torch.manual_seed(0)
    return Adapted(TinyVision(dropout=0.3, batchnorm=True), kind, rank=2, stages=stages)


class Moved(Callback):
    """Names of the parameters and buffers that each optimizer step moves."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = {n: v.clone() for n, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            now = pl_module.state_dict()
            self.moved.append({n for n, v in self._before.items() if not torch.equal(v, now[n])})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("adapters") / "data", each=16)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_stage_without_adapters_is_frozen_in_weights_statistics_and_mode(kind: str, root: Path, tmp_path) -> None:
    """As shipped, without Freeze; with it the run is the same, bit by bit."""
    moved = Moved()
    _, task = fit(root, [moved, Ledger(tmp_path)], backbone=adapted(kind, ["last"]), max_epochs=2)
    assert task.frozen_stages == {"stem", "middle"}
    names = {n for step in moved.moved for n in step}
    assert {n for n in names if n.startswith("backbone.")} == {n for n in task.state_dict() if is_adapter(n)}
    with (tmp_path / "ledger.csv").open(newline="") as file:
        rows = {row["stage"]: (row["mode"], row["batchnorm"]) for row in csv.DictReader(file)}
    assert rows == {
        "stem": ("frozen", ""),
        "middle": ("frozen", "frozen"),
        "last": ("train", ""),
        "head.photo": ("train", ""),
    }
    _, other = fit(root, [Freeze(kinds=["adapter"])], backbone=adapted(kind, ["last"]), max_epochs=2)
    assert torch.equal(flat(task), flat(other))


def test_a_stage_with_adapters_is_in_training_mode(root: Path) -> None:
    moved = Moved()
    _, task = fit(root, [moved], backbone=adapted(stages=["middle"]), max_epochs=1)
    assert task.frozen_stages == {"stem", "last"}
    assert any(n.endswith("middle.1.running_mean") for n in moved.moved[0])
    assert all(module.training for module in task.backbone.inner.middle.modules())


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory):
    folder, moved = tmp_path_factory.mktemp("phases"), Moved()
    trainer, task = fit(root, [GradualUnfreezing(PHASES), moved], folder, backbone=adapted("dora"), max_epochs=3)
    return folder, moved, trainer, task


def test_phases_go_from_the_head_over_adapters_to_everything(whole) -> None:
    _, moved, trainer, task = whole
    assert trainer.global_step > 6
    parameters = {n for n, _ in task.named_parameters()}
    heads = {n for n in parameters if n.startswith("heads.")}
    adapters = {n for n in parameters if is_adapter(n)}
    found = [step & parameters for step in moved.moved]
    assert found[:2] == [heads] * 2
    assert found[2] <= heads | adapters  # lora_A has no gradient while lora_B is zero
    assert found[3:5] == [heads | adapters] * 2
    assert found[5:] == [parameters] * len(found[5:])


def test_a_resumed_run_ends_in_the_same_bits(whole, root: Path, tmp_path: Path) -> None:
    folder, _, trainer, _ = whole
    final = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    for start in (1, 2, 4, 5, trainer.global_step - 1):
        run, path = tmp_path / str(start), folder / "checkpoints" / f"step-{start}.ckpt"
        fit(root, [GradualUnfreezing(PHASES), Moved()], run, path, backbone=adapted("dora"), max_epochs=3)
        mine = load_checkpoint(run / "checkpoints" / "last.ckpt")
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "schedule", "callbacks", "global_step"):
            equal(final[part], mine[part], f"from step {start}: {part}")


def test_adapters_alone_resume_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    run = partial(fit, root, [], max_epochs=2)
    _, task = run(tmp_path / "a", backbone=adapted(stages=["last"]))
    _, again = run(tmp_path / "b", tmp_path / "a" / "checkpoints" / "step-3.ckpt", backbone=adapted(stages=["last"]))
    assert torch.equal(flat(task), flat(again))
    assert again.frozen_stages == {"stem", "middle"}
