"""Methods compose: switching one on or off does not move what it has no business with."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from tiny import TinyVision, flat, image_domains

from crossft.callbacks.adaptation import DANN
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.retention import L2SP
from crossft.data import DomainData
from crossft.errors import CheckpointError, ConfigError, TrainingError
from crossft.tasks import Classification


def fit(root: Path, methods: list[Callback], *, data_args: dict | None = None, backbone=None, **kwargs):
    seed_everything(5, verbose=False)
    both = {"train_on": ["source", "target"], "target_labels": "none"}
    data = DomainData(
        root, "photo", "sketch", batch_size=8, augment="flip", seed=5, **(both if data_args is None else data_args)
    )
    data.prepare()
    task = Classification(backbone or TinyVision(dropout=0.2), list(data.domains))
    trainer = Trainer(
        **{"max_steps": 4, **kwargs},
        callbacks=methods,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data)
    return trainer, task


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images"), each=16)


@pytest.fixture(scope="module")
def plain(root: Path) -> torch.Tensor:
    return flat(fit(root, [])[1])


@pytest.mark.parametrize("method", [DANN(weight=0.0, hidden=8), L2SP(weight=0.0)])
def test_weight_zero_leaves_the_weights_bit_identical(root: Path, plain: torch.Tensor, method: Callback) -> None:
    assert torch.equal(flat(fit(root, [method])[1]), plain)


def test_a_method_at_its_weight_changes_them(root: Path, plain: torch.Tensor) -> None:
    assert not torch.equal(flat(fit(root, [DANN(hidden=8)])[1]), plain)
    assert not torch.equal(flat(fit(root, [L2SP()])[1]), plain)


def test_the_order_of_methods_does_not_matter(root: Path) -> None:
    one = fit(root, [DANN(hidden=8), L2SP()])[1]
    two = fit(root, [L2SP(), DANN(hidden=8)])[1]
    assert torch.equal(flat(one), flat(two))


def test_a_method_does_not_move_the_start_of_another(root: Path) -> None:
    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.weights = flat(pl_module.attachments.terms["dann"])

    alone, beside = Start(), Start()
    fit(root, [DANN(hidden=8), alone])
    fit(root, [L2SP(), DANN(hidden=8), beside])
    assert torch.equal(alone.weights, beside.weights)


def test_permuting_the_labels_of_an_unlabeled_target_changes_no_bit(root: Path, tmp_path: Path) -> None:
    """Files move between class folders, so paths and labels change, and the content stays."""
    shutil.copytree(root, tmp_path / "permuted")
    target = tmp_path / "permuted" / "sketch"
    for i, path in enumerate(sorted(target.glob("*/*.png"))):
        path.rename(target / ("dog", "cat")[i % 2] / f"moved-{i:03d}.png")
    for methods in ([], [DANN(hidden=8), L2SP()]):
        a, b = (flat(fit(r, methods)[1]) for r in (root, tmp_path / "permuted"))
        assert torch.equal(a, b)


def test_evaluation_does_not_advance_the_clock(root: Path) -> None:
    """Four steps with a validation after each, and without any: the adversarial schedule is the same."""
    often = fit(root, [DANN(hidden=8)], val_check_interval=1, check_val_every_n_epoch=None)[1]
    never = fit(root, [DANN(hidden=8)], limit_val_batches=0)[1]
    assert torch.equal(flat(often), flat(never))


def test_every_parameter_is_in_the_optimizer_and_only_trainable_ones_move(root: Path) -> None:
    backbone = TinyVision()
    before = {n: p.clone() for n, p in backbone.named_parameters()}
    trainer, task = fit(root, [Freeze(train_last=1)], backbone=backbone)
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in task.parameters()}
    moved = {n for n, p in backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"last.0.weight", "last.0.bias"}


def test_a_differing_source_space_keeps_its_head_as_it_was(tmp_path: Path) -> None:
    image_domains(tmp_path, domains=("photo",), classes=("cat", "dog"))
    image_domains(tmp_path, domains=("sketch",), classes=("bird", "fish", "worm"))

    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.heads = {k: flat(v) for k, v in pl_module.heads.items()}
            self.modes = {k: v.training for k, v in pl_module.heads.items()}

    start = Start()
    _, task = fit(tmp_path, [start], data_args={"train_on": ["target"]})
    assert start.modes == {"photo": False, "sketch": True}
    assert task.head_keys == {"photo": "photo", "sketch": "sketch"}
    assert torch.equal(flat(task.heads["photo"]), start.heads["photo"])
    assert not torch.equal(flat(task.heads["sketch"]), start.heads["sketch"])


def test_terms_are_clipped_apart_from_the_model(root: Path) -> None:
    """A discriminator with a huge gradient does not shrink the model's own step."""

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            def norm(module) -> torch.Tensor:
                grads = [p.grad for p in module.parameters() if p.grad is not None]
                return torch.stack([g.norm() for g in grads]).norm() if grads else torch.zeros(())

            model = torch.nn.ModuleList([pl_module.backbone, pl_module.heads])
            self.model, self.term = norm(model), norm(pl_module.attachments.terms["dann"])

    norms = Norms()
    fit(root, [DANN(weight=1000.0, hidden=8), norms], gradient_clip_val=0.01, max_steps=2)
    assert float(norms.model) == pytest.approx(0.01, rel=1e-3)
    assert float(norms.term) == pytest.approx(0.01, rel=1e-3)


class Scaled(MixedPrecision):
    """fp16's loss scaling without fp16's rounding, on the CPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return nullcontext()


def test_penalties_and_clipping_see_unscaled_gradients(root: Path) -> None:
    """Under fp16 the gradient is unscaled before callbacks read it, penalties are added and it is clipped."""

    class Read(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))

    plain, scaled = Read(), Read()
    _, expected = fit(root, [L2SP(weight=100.0), plain], gradient_clip_val=0.5)
    _, task = fit(root, [L2SP(weight=100.0), scaled], gradient_clip_val=0.5, plugins=[Scaled()])
    assert len(plain.seen) == len(scaled.seen) == 4
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(plain.seen, scaled.seen))
    assert torch.allclose(flat(task), flat(expected), rtol=0, atol=1e-7)
    assert not torch.allclose(flat(task), flat(fit(root, [], gradient_clip_val=0.5)[1]), rtol=0, atol=1e-4)


def test_a_batch_out_of_step_stops_training(root: Path) -> None:
    class Shift(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            batch.step += 1

    with pytest.raises(TrainingError, match="out of step"):
        fit(root, [Shift()])


def test_a_checkpoint_of_other_methods_is_refused() -> None:
    from crossft.types import Domain

    task = Classification(TinyVision(), [Domain("photo", "source", labels=("a", "b"))])
    with pytest.raises(CheckpointError, match=r"holds the methods \['ewc'\], the run has \[\]"):
        task.attachments.load({"ewc": {"state": {}}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DANN(weight=-1.0), "weight=-1.0"),
        (lambda: DANN(hidden=0), "hidden=0"),
        (lambda: Freeze(), "train_last, train, match"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_freezing_more_stages_than_there_are_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match="train_last=9 must be between 0 and 3"):
        fit(root, [Freeze(train_last=9)])
