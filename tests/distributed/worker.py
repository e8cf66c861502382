"""Runs in one or two processes (torchrun): trains tiny tasks and writes what they end at. See ``test_equality.py``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from tiny import TinyVision, flat

from crossft.callbacks.adaptation import DANN
from crossft.callbacks.monitoring import FiniteCheck
from crossft.callbacks.retention import L2SP
from crossft.data import DomainData
from crossft.errors import TrainingError
from crossft.tasks import Classification

METHODS = {
    "none": lambda: [],
    "l2sp": lambda: [L2SP(weight=0.5)],
    "dann": lambda: [DANN(weight=1.0, hidden=8)],
    "both": lambda: [DANN(weight=1.0, hidden=8), L2SP(weight=0.5)],
}


class Poison(Callback):
    """Spoils one weight of the last process before the second optimizer step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1 and trainer.global_rank == WORLD - 1:
            next(pl_module.heads.parameters()).data.flatten()[0] = float("nan")


def diverged(data: DomainData) -> str:
    """How a fit ends whose weight is spoiled: what the check says, which every process must say."""
    try:
        fit(data, [Poison(), FiniteCheck()], 1, 6)
    except TrainingError as error:
        return str(error)
    return "it went on"


WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def data_of(root: Path, accumulation: int, **kwargs) -> DomainData:
    size = kwargs.pop("global_batch", 16) // (WORLD * accumulation)
    data = DomainData(root=str(root), source="photo", target="sketch", batch_size=size, augment="none", **kwargs)
    data.prepare()
    return data


def fit(
    data: DomainData, methods: list, accumulation: int, steps: int | None, **kwargs
) -> tuple[Trainer, torch.nn.Module]:
    seed_everything(1, verbose=False)
    task = Classification(
        TinyVision(),
        list(data.domains),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        **kwargs,
    )
    trainer = Trainer(
        max_steps=steps or -1,
        max_epochs=None if steps else 1,
        accumulate_grad_batches=accumulation,
        callbacks=methods,
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data)
    return trainer, task


def main(root: Path, out: Path) -> None:
    results: dict[str, torch.Tensor] = {}
    metrics: dict[str, dict[str, float]] = {}
    for accumulation in (1, 4 // WORLD):
        for name, methods in METHODS.items():
            data = data_of(root, accumulation, train_on=["source", "target"], target_labels="none")
            _, task = fit(data, methods(), accumulation, 3)
            results[f"{name}/{accumulation}"] = flat(task)
        # one labeled pool: 3 ragged epochs' worth of rows; metrics of all domains afterwards
        data = data_of(root, accumulation, train_on=["target"])
        trainer, task = fit(data, [], accumulation, None)
        results[f"ragged/{accumulation}"] = flat(task)
        trainer.test(task, data, verbose=False)
        metrics[f"ragged/{accumulation}"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        for name, bins in task.evaluation.calibration_bins.items():
            counted = {f"bins/{name}/{i}": v for i, v in enumerate(bins.flatten().tolist())}
            metrics[f"ragged/{accumulation}"] |= counted
    said = diverged(data_of(root, 1, train_on=["target"]))
    rank = int(os.environ.get("RANK", "0"))
    (out / f"diverged-{WORLD}-{rank}.txt").write_text(said)
    torch.save(results, out / f"results-{WORLD}-{rank}.pt")
    (out / f"metrics-{WORLD}-{rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
