"""Policy ``reestimated`` in a fit: validated, chosen and saved is the model with its own statistics, and training goes
on as if nothing were replaced.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from tiny import TinyVision, image_domains, permute_labels

from crossft.callbacks.adaptation import SWAD
from crossft.callbacks.averaging import EMA
from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, Scores, load_checkpoint
from crossft.data import DomainData
from crossft.data.passes import batch_of, training_rows
from crossft.errors import ConfigError
from crossft.tasks import Classification

MEAN = "backbone.middle.1.running_mean"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("statistics") / "data", each=16)


def data_of(root: Path, target: str | None = "sketch", augment: str = "none") -> DomainData:
    options = {"train_on": "source", "target_labels": "none", "batch_size": 4, "augment": augment, "seed": 7}
    data = DomainData(root=root, source="photo", target=target, **options)
    data.prepare()
    return data


def fit(
    root: Path,
    folder: Path | None = None,
    *callbacks: Callback,
    policy: str = "reestimated",
    target: str | None = "sketch",
    resume: Path | None = None,
    last: int = 1,
    batchnorm: bool = True,
    augment: str = "none",
    **options,
) -> Classification:
    """Train on the source alone, its last stage, with validations within epochs."""
    seed_everything(7, verbose=False)
    data = data_of(root, target, augment)
    task = Classification(TinyVision(dropout=0.3, batchnorm=batchnorm), list(data.domains), batchnorm=policy)
    saving = [Checkpoints(folder, every_n_steps=1, keep=100, monitor="source/val/loss", mode="min")] if folder else []
    trainer = Trainer(
        **{"max_epochs": 3, "val_check_interval": 2, "num_sanity_val_steps": 2, **options},
        callbacks=[Freeze(train_last=last), *callbacks, *saving],
        plugins=[AtomicCheckpointIO()] if folder else [],
        logger=False,
        enable_checkpointing=bool(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return task


class Losses(Callback):
    """The validation loss each time."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics["source/val/loss"]))


class Means(Callback):
    """The running mean of the frozen stage at every step and at every validation."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validations: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append(pl_module.backbone.middle[1].running_mean.clone())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking:
            self.validations.append(pl_module.backbone.middle[1].running_mean.clone())


def by_hand(root: Path, name: str) -> torch.Tensor:
    """What the frozen stem and the first layer of the middle make of a domain's training rows, on average."""
    seed_everything(7, verbose=False)
    data = data_of(root)
    net = TinyVision(dropout=0.3, batchnorm=True).eval()
    data.bind(net.input_spec)
    number = [d.name for d in data.domains].index(name)
    rows = training_rows(data, data.domains[number].role)[number]
    pixels = batch_of(data, rows.tolist(), number).inputs["pixel_values"]
    with torch.no_grad():
        made = net.middle[0](net.stem(pixels))
    return torch.stack([part.mean(0) for part in made.split(8)]).mean(0)  # batches of 8, each counts the same


@pytest.mark.parametrize(("policy", "domain"), [("reestimated", "sketch"), ("reestimated_source", "photo")])
def test_what_is_validated_and_saved_has_the_statistics_of_a_domain(
    root: Path, tmp_path: Path, policy: str, domain: str
) -> None:
    means = Means()
    task = fit(root, tmp_path, means, policy=policy)
    expected = by_hand(root, domain)
    assert all(torch.equal(mean, torch.zeros(12)) for mean in means.steps)
    assert len(means.validations) >= len(means.steps) > 9
    for found in (*means.validations, task.backbone.middle[1].running_mean):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name in ("best", "last"):
        saved = load_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt")
        torch.testing.assert_close(saved["state_dict"][MEAN], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [1, 2])
def test_training_is_that_without_the_replacement(root: Path, last: int) -> None:
    """With BatchNorm in a frozen stage, and in one that trains."""
    adapted, plain = (fit(root, policy=policy, last=last).state_dict() for policy in ("reestimated", "training"))
    for name, value in plain.items():
        assert torch.equal(adapted[name], value) == ("running_" not in name), name


def test_the_prefix_cache_never_takes_one_for_the_other(root: Path) -> None:
    """Random augmentation, so that only evaluation is cached, and a look at the starting model before it."""

    def losses(policy: str, *methods: Callback, sanity: int = 0) -> list[float]:
        seen = Losses()
        fit(root, None, seen, *methods, policy=policy, augment="flip", num_sanity_val_steps=sanity)
        return seen.values

    plain = {policy: losses(policy) for policy in ("reestimated", "frozen")}
    for policy in ("reestimated", "frozen", "reestimated"):
        assert losses(policy, PrefixCache(), sanity=1) == pytest.approx(plain[policy], abs=1e-5), policy


def test_a_fit_that_early_stopping_ends_has_them_too(root: Path) -> None:
    stop = EarlyStopping("source/val/loss", patience=1, min_delta=100.0)
    task = fit(root, None, stop, val_check_interval=1.0)
    assert task.trainer.current_epoch == 2
    assert not torch.equal(task.backbone.middle[1].running_mean, torch.zeros(12))


def test_a_run_resumed_after_a_validation_ends_at_the_same_bits(root: Path, tmp_path: Path) -> None:
    whole = fit(root, tmp_path)
    steps = sorted(int(p.stem.partition("-")[2]) for p in (tmp_path / "checkpoints").glob("step-*.ckpt"))
    held = [n for n in steps if "training_statistics" in load_checkpoint(tmp_path / f"checkpoints/step-{n}.ckpt")]
    assert held, "saves after a validation hold the statistics that train"
    assert len(held) < len(steps)
    for step in (held[0], next(n for n in steps if n not in held), held[-2]):
        again = fit(root, tmp_path, resume=tmp_path / f"checkpoints/step-{step}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (step, name)


def test_permuting_the_labels_of_the_target_changes_no_bit(tmp_path: Path) -> None:
    """Neither of the weights, nor of the statistics, nor when a stop by a label-free score ends the fit."""
    root, ends = image_domains(tmp_path / "data", each=32), []
    for folder in (root, permute_labels(root, tmp_path / "permuted")):
        stop = EarlyStopping("target/val/infomax", mode="max", patience=2, min_delta=0.01)
        task = fit(folder, None, Scores(), stop, max_epochs=30)
        ends.append((task.trainer.global_step, task.state_dict(), stop.best_score))
    assert ends[0][0] == ends[1][0] < 30 * task.trainer.num_training_batches
    assert ends[0][2] == ends[1][2]
    for name, value in ends[0][1].items():
        assert torch.equal(ends[1][1][name], value), name


def test_what_cannot_work_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no training rows of that role; set data.target"):
        fit(root, target=None)
    with pytest.raises(ConfigError, match=r"on a backbone without BatchNorm layers; leave it out"):
        fit(root, batchnorm=False)
    with pytest.raises(ConfigError, match=r"methods.ema publishes other weights than those"):
        fit(root, None, EMA())
    with pytest.raises(ConfigError, match=r"methods.swad averages weights, and BatchNorm statistics that move"):
        fit(root, None, SWAD())
    with pytest.raises(ConfigError, match=r"methods.swad ends its average by itself, and EarlyStopping would"):
        fit(root, None, SWAD(), EarlyStopping("source/val/loss"), policy="frozen")
    with pytest.raises(ConfigError, match=r"methods.swad chooses the weights .* set select.metric to null"):
        fit(root, tmp_path, SWAD(), policy="frozen")
