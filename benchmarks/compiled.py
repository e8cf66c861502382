"""What torch.compile gains: training steps with `Compile` beside the same without, and what compiling costs.

    python benchmarks/compiled.py [--rows 256] [--texts 224] [--rounds 2]

EfficientNet-lite0 on pacs-96 and MiniLM on amazon4-airline, everything training, under Lightning in one thread. Each
round fits two epochs plainly and two compiled, in turns; a step's time is the median over the second epoch, and the
cost of compiling is what the first epoch takes longer. Backend inductor, which needs a C++ compiler. There is no bound:
the table says whether the option is worth its start here. Nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")

from cases import Build, make, quiet, text, vision
from timing import clock, take_turns

# isort: split
import lightning.pytorch as pl
import torch

from crossft.callbacks.caching import Compile
from crossft.data import DomainData


class Steps(pl.Callback):
    """Seconds of each training step, and of each epoch."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun, self.steps = clock(), []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = clock()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(clock() - self.start)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(clock() - self.begun)


def fit(build: Build, data: DomainData, compiled: bool) -> tuple[float, float, float]:
    """Median seconds of a step of the second epoch; seconds of the first epoch and of the second."""
    torch.compiler.reset()
    task, steps = make(build, data, None), Steps()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[steps, *([Compile()] if compiled else [])],
    )  # fmt: skip
    trainer.fit(task, data)
    return statistics.median(steps.steps), *steps.epochs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="images")
    parser.add_argument("--texts", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    quiet()
    print(f"{'':19}{'plain step':>12}{'compiled':>12}{'ratio':>8}{'compiling, first time':>24}{'again':>10}")
    for name, (build, data) in {"EfficientNet-lite0": vision(args.rows), "MiniLM": text(args.texts)}.items():
        found = take_turns({str(on): partial(fit, build, data, on) for on in (False, True)}, args.rounds)
        plain, fast = (statistics.median(step for step, _, _ in found[key]) for key in ("False", "True"))
        costs = [first - second for _, first, second in found["True"]]
        row = f"{name:19}{plain * 1e3:9.1f} ms{fast * 1e3:9.1f} ms{fast / plain:8.2f}"
        print(f"{row}{costs[0]:22.1f} s{costs[-1]:8.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
