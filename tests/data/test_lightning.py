"""Inside a Trainer, with a plain module: what is yielded, and what resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from tiny import image_domains
from torch import Tensor

from crossft.data import DomainData, TableFile
from crossft.types import Batch, ImageSpec


class Plain(pl.LightningModule):
    """One weight; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.backbone = SimpleNamespace(input_spec=ImageSpec((4, 4), (0.5,) * 3, (0.5,) * 3, "bilinear"))
        self.seen: list[tuple[int, int, list[int], float]] = []
        self.evaluated: list[tuple[int, int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pixels = batch.inputs["pixel_values"]
        self.seen.append((self.trainer.global_step, batch.step, batch.sample_ids.tolist(), float(pixels.sum())))
        return self.weight * pixels.mean()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated += [(dataloader_idx, int(d)) for d in batch.domains]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    def __init__(self, step: int | None, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and batch_idx % 2 == 1:
            trainer.save_checkpoint(self.path)


def fit(root: Path, path: Path, save: int | None = None, resume: bool = False, workers: int = 0) -> Plain:
    data = DomainData(
        root, "photo", "sketch", train_on=["source", "target"], target_labels="none", batch_size=4, num_workers=workers
    )
    model = Plain()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, callbacks=[SaveAt(save, path)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=str(path) if resume else None, weights_only=True if resume else None)
    return model


def test_a_fit_resumed_from_any_step_sees_what_the_whole_one_sees(tmp_path):
    root, path = image_domains(tmp_path / "data", each=15, size=4), tmp_path / "at.ckpt"
    whole = fit(root, path)
    steps = [now for now, _, _, _ in whole.seen]
    assert steps == [now for _, now, _, _ in whole.seen], "the batch's step is the trainer's"
    per_epoch = len(steps) // 4
    assert steps == [s for s in range(2 * per_epoch) for _ in (0, 1)]
    assert {loader for loader, _ in whole.evaluated} == {0, 1}
    assert all(loader == domain for loader, domain in whole.evaluated)
    for step in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        fit(root, path, save=step)
        again = fit(root, path, resume=True, workers=2 if step == per_epoch else 0)
        assert again.seen == whole.seen[2 * step :]


@pytest.mark.parametrize("form", ["words", "lists"])
def test_the_command_line_is_built_from_the_constructor(form):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DomainData, "data")
    if form == "words":
        argv = ["--data.root=x", "--data.source=a,b", "--data.target=5", "--data.train_on=source", "--data.shots=3"]
        argv += ["--data.mix.source=2", "--data.reader=TableFile", "--data.reader.names=[text,label]", "--data.epoch=5"]
    else:
        argv = ["--data.root=x", "--data.source=[a, b]", "--data.target=[c]", "--data.train_on=[source, target]"]
        argv += ["--data.splits=[0.5, 0.25, 0.25]", "--data.mix={source: 1, target: 3}", "--data.labels=[0, 1]"]
    data = parser.instantiate(parser.parse_args(argv)).data
    assert data.roles["source"] == ["a", "b"]
    if form == "words":
        assert (data.roles["target"], data.train_on, data.shots, data.mix) == (["5"], ["source"], 3, {"source": 2.0})
        assert isinstance(data.reader, TableFile)
        assert data.reader.names == ["text", "label"]
    else:
        assert (data.splits, data.mix) == ((0.5, 0.25, 0.25), {"source": 1.0, "target": 3.0})
        assert data.labels == [0, 1]
