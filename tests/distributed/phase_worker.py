"""Runs in one or two processes (torchrun): trains through four phases, then the naive way. See ``test_phases.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from tiny import TinyVision, flat

from crossft.callbacks.adaptation import DANN
from crossft.callbacks.freezing import GradualUnfreezing, Phase, RankSentinel
from crossft.data import DomainData
from crossft.errors import TrainingError
from crossft.optim import Linear
from crossft.tasks import Classification

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PHASES = [
    Phase(train_last=0, steps=2),
    Phase(train_last=1, steps=2, rates="rewarm", warmup=2),
    Phase(match=["middle.*"], kinds=["bias"], steps=2, moments="reset"),
    Phase(lr=0.5, rates="restart"),
]


class Watch(Callback):
    """Keeps the weights after every optimizer step, which parameters train, are reduced and have a gradient."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.facts: list[dict[str, object]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = list(pl_module.named_parameters())
        trains = sorted(n for n, p in named if p.requires_grad)
        known = trainer.strategy.model._get_ddp_logging_data() if WORLD > 1 else {"num_parameter_tensors": len(trains)}
        self.facts.append(
            {
                "trains": trains,
                "reduced": known["num_parameter_tensors"],
                "graded": sorted(n for n, p in named if p.grad is not None),
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append(flat(pl_module))


class Naive(Callback):
    """What crossft does not do: freeze in ``setup``, thaw later, and leave DDP as it is."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.train_stages([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            pl_module.train_stages(["stem", "middle", "last"])


def fit(root: Path, accumulation: int, methods: list[Callback]) -> None:
    data = DomainData(
        root=str(root), source="photo", target="sketch", batch_size=16 // (WORLD * accumulation), augment="none",
        train_on=["source", "target"], target_labels="none",
    )  # fmt: skip
    data.prepare()
    seed_everything(1, verbose=False)
    task = Classification(
        TinyVision(batchnorm=True),
        list(data.domains),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        schedule=Linear(warmup=2),
    )
    trainer = Trainer(
        max_steps=8,
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
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data)


def main(root: Path, out: Path) -> None:
    results: dict[str, object] = {}
    for accumulation in (1, 2):
        watch = Watch()
        fit(root, accumulation, [DANN(hidden=8), GradualUnfreezing(PHASES), RankSentinel(every_n_steps=1), watch])
        results[f"weights/{accumulation}"] = watch.weights
        results[f"facts/{accumulation}"] = watch.facts
    try:
        fit(root, 1, [Naive(), RankSentinel(every_n_steps=1)])
        results["naive"] = ""
    except TrainingError as error:
        results["naive"] = str(error)
    torch.save(results, out / f"phases-{WORLD}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
