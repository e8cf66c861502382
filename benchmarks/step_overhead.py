"""What a training step costs beyond the arithmetic: bare Lightning and crossft over a hand-written PyTorch loop.

    python benchmarks/step_overhead.py [--pairs 20] [--steps 600]

The net is 16 wide and linear, so nearly all of a step is bookkeeping. All three train the same net on the same
batches with the fused AdamW and a cosine schedule; crossft also keeps what every run of it keeps: mixed domains, named
parameter groups, the logged loss, `metrics.csv` and checkpoints in a run folder, the ledger, the check for NaN, the
drift, and the ear for signals. The three take turns in one process; the first steps of each turn are not counted, nor
are the ends of a fit. The bounds are <= 1.3 for the ratio of the two extra costs, and <= 2.5 with DANN (a discriminator
of 16 hidden units).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

from cases import in_a_run
from timing import take_turns

# isort: split
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from crossft.backbones import Backbone
from crossft.backbones.base import StagePlan
from crossft.callbacks.adaptation import DANN
from crossft.optim import Cosine
from crossft.tasks import Classification
from crossft.types import Batch, Domain, Encoded, ImageSpec

WIDTH, CLASSES, ROWS, WARM_UP = 16, 4, 16, 100
BOUNDS = {"crossft": 1.3, "crossft, DANN": 2.5}
Rows = list[tuple[Tensor, Tensor]]


class LinearBackbone(Backbone):
    """One linear stage."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.num_features, self.pretrained = WIDTH, True
        self.input_spec = ImageSpec((1, WIDTH), (0.0,), (1.0,), channels=1)
        self._plans = (StagePlan("linear", ("linear",)),)

    def _encode(self, start: int, value: Tensor | None, inputs: Any, capture: Any) -> Encoded:
        return Encoded(features=self.linear(inputs["pixel_values"]))

    def _reason(self, index: int) -> str | None:
        return None

    def export(self, folder: Path) -> Path:
        raise AssertionError("never exported")


def scheduled(optimizer: torch.optim.Optimizer, total: int) -> LambdaLR:
    """The cosine schedule of the loop and of bare Lightning."""
    return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step, total) / total)) / 2)


class Bare(pl.LightningModule):
    """The least a LightningModule can be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)
        scheduler = scheduled(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Clock(pl.Callback):
    """Seconds a step, from the end of the warm-up to the end of the last step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.start, self.seconds = steps, 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == WARM_UP:
            self.start = time.perf_counter()
        elif batch_idx + 1 == self.steps:
            self.seconds = (time.perf_counter() - self.start) / (self.steps - WARM_UP)


def loop(rows: Rows) -> float:
    """Seconds a step of the hand-written loop."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    scheduler = scheduled(optimizer, len(rows))
    start = 0.0
    for i, (x, y) in enumerate(rows):
        if i == WARM_UP:
            start = time.perf_counter()
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return (time.perf_counter() - start) / (len(rows) - WARM_UP)


def fit(module: pl.LightningModule, batches: list[Any], callbacks: list[Any], **settings: Any) -> float:
    """Seconds a step of one epoch under a Lightning trainer."""
    clock = Clock(len(batches))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*callbacks, clock],
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda b: b))
    return clock.seconds


def bare(rows: Rows) -> float:
    return fit(Bare(), rows, [], logger=False, enable_checkpointing=False)


class Attached(pl.Callback):
    """Attaches DANN, as its own setup does where there is a data module."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.attach("dann", DANN(hidden=WIDTH).build(pl_module), 1.0)


def ours(batches: list[Batch], folder: Path, *methods: pl.Callback) -> float:
    labels = tuple("abcd")
    domains = [Domain("known", "source", labels=labels), Domain("new", "target", labels=labels)]
    task = Classification(LinearBackbone(), domains, schedule=Cosine())
    with in_a_run(folder) as (kept, settings):
        return fit(task, batches, [*methods, *kept], **settings)


def make_batches(steps: int) -> tuple[Rows, list[Batch]]:
    """The same rows twice: as (inputs, targets), and as mixed batches of two domains."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        (torch.randn(ROWS, WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator))
        for _ in range(steps)
    ]
    domains = torch.arange(ROWS) % 2
    labeled = torch.ones(ROWS, dtype=torch.bool)
    batches = [
        Batch({"pixel_values": x}, y, labeled, domains, torch.arange(ROWS), (ROWS / 2, ROWS / 2), float(ROWS), step)
        for step, (x, y) in enumerate(rows)
    ]
    return rows, batches


def step_costs(pairs: int, steps: int) -> dict[str, float]:
    """Print the table of costs; return extra costs over bare Lightning's."""
    rows, batches = make_batches(steps)
    with tempfile.TemporaryDirectory() as folder:

        def mine(*methods: pl.Callback) -> float:
            return ours(batches, Path(tempfile.mkdtemp(dir=folder)) / "run", *methods)

        things = {"loop": lambda: loop(rows), "bare Lightning": lambda: bare(rows), "crossft": mine}
        times = take_turns({**things, "crossft, DANN": lambda: mine(Attached())}, pairs)
    print(f"{'':16}{'us a step':>12}{'extra':>12}{'quartiles of the extra':>28}   (median of {pairs})")
    extra = {}
    for name, values in times.items():
        over = sorted((v - base) * 1e6 for v, base in zip(values, times["loop"], strict=True))
        extra[name] = statistics.median(over)
        quartiles = f"{over[len(over) // 4]:.0f} .. {over[(3 * len(over)) // 4]:.0f}"
        print(f"{name:16}{statistics.median(values) * 1e6:12.0f}{extra[name]:12.0f}{quartiles:>28}")
    return {name: value / extra["bare Lightning"] for name, value in extra.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600, help="steps of one turn, the warm-up included")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ratios = step_costs(args.pairs, args.steps)
    print()
    for name, bound in BOUNDS.items():
        print(f"{name}: extra cost over bare Lightning's {ratios[name]:.2f} (bound {bound})")
    return 0 if all(ratios[name] <= bound for name, bound in BOUNDS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
