"""A fit that diverges stops with its reason; one that does not is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny import TinyVision, flat, image_domains

from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, FiniteCheck, latest_valid, load_checkpoint
from crossft.data import DomainData
from crossft.errors import TrainingError
from crossft.tasks import Classification


class Spoil(Callback):
    """Makes one weight NaN before an optimizer step (from 1); counts the epochs that later callbacks saw end."""

    def __init__(self, step: int) -> None:
        self.step, self.ended = step, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:
            pl_module.backbone.stem[1].bias.data[0] = float("nan")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("finite") / "data", each=16)


def fit(root: Path, callbacks: list[Callback], every: int = 50, accumulate: int = 1, lr: float = 0.01) -> Any:
    seed_everything(3, verbose=False)
    data = DomainData(root=root, target="sketch", batch_size=4, augment="none")
    data.prepare()
    task = Classification(TinyVision(), list(data.domains), optimizer=lambda p: torch.optim.SGD(p, lr=lr))
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=accumulate, callbacks=callbacks, logger=False, log_every_n_steps=every,
        enable_checkpointing=any(isinstance(c, Checkpoints) for c in callbacks), plugins=[AtomicCheckpointIO()],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, data)
    return task


def test_it_changes_no_bit_of_a_fit_that_goes_well(root: Path) -> None:
    assert torch.equal(flat(fit(root, [FiniteCheck()], every=1)), flat(fit(root, [])))


@pytest.mark.parametrize(("every", "accumulate", "now"), [(1, 1, 2), (2, 1, 2), (3, 1, 3), (1, 2, 2), (50, 1, 6)])
def test_it_names_the_step_and_stops_at_the_next_look(root: Path, every: int, accumulate: int, now: int) -> None:
    spoil = Spoil(step=2)
    with pytest.raises(TrainingError, match=rf"not finite since optimizer step \d \(now at step {now}\); lower the"):
        fit(root, [FiniteCheck(), spoil], every, accumulate)
    assert spoil.ended == 0, "it spoke before the epoch's checkpoint"


@pytest.mark.parametrize("lr", [0.01, float("inf")])
def test_no_checkpoint_is_written_once_it_diverged(root: Path, tmp_path: Path, lr: float) -> None:
    """Saves of every step come before the next look: one weight is NaN from step 2 on, or all are after step 1."""
    saves = Checkpoints(tmp_path, every_n_steps=1, keep=9)
    with pytest.raises(TrainingError, match="training diverged"):
        fit(root, [FiniteCheck(), Spoil(step=2), saves], every=50, lr=lr)
    last = latest_valid(tmp_path / "checkpoints")
    if lr != 0.01:
        assert last is None
        return
    assert last is not None
    saved = load_checkpoint(last)
    assert saved["global_step"] == 1
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_weights_that_are_lost_in_the_last_step_are_seen(root: Path) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: .*now at step 1\)"):
        fit(root, [FiniteCheck()], every=1, lr=float("inf"))
