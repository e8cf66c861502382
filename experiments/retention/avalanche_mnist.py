"""Avalanche on the same domain-incremental split MNIST as `mnist.yaml`: network, optimizer, batches, strengths.

    pip install avalanche-lib
    python -W ignore experiments/retention/avalanche_mnist.py MNIST_NPZ --output experiments/retention/avalanche.csv

Five tasks of two digits, even or odd; an MLP of 2 x 400 units, Adam 0.001, batches of 128, 21 epochs a task (about
2,000 iterations). EWC twice: at the strength of `mnist.yaml` (its loss has no 1/2), and at 128 times that, since its
Fisher squares the gradient of a batch's mean, which makes it about a batch size too small. LwF's alpha is 4, as its
loss lacks the factor T^2; SI's importance is cut off at 0.001 there, and its gradient holds the penalty's. Prints
the mean accuracy over the tasks' test images after the last task.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import EWC, LwF, Naive, SynapticIntelligence
from torch import Tensor, nn

BATCH, EPOCHS, TASKS = 128, 21, 5
METHODS: dict[str, Callable[..., Any]] = {
    "plain": Naive,
    "ewc": lambda **own: EWC(ewc_lambda=5e9, **own),
    "ewc x 128": lambda **own: EWC(ewc_lambda=5e9 * BATCH, **own),
    "si": lambda **own: SynapticIntelligence(si_lambda=100_000.0, eps=0.1, **own),
    "lwf": lambda **own: LwF(alpha=4.0, temperature=2.0, **own),
    "replay": lambda **own: Naive(plugins=[ReplayPlugin(mem_size=800, batch_size_mem=BATCH)], **own),
}


def tasks(file: Path) -> Any:
    """The benchmark: pixels in [0, 1], labels even (0) and odd (1)."""
    streams = {}
    with np.load(file) as mnist:
        for split in ("train", "test"):
            x, y = mnist[f"x_{split}"], mnist[f"y_{split}"]
            rows = [np.flatnonzero(y // 2 == task) for task in range(TASKS)]
            streams[split] = [
                (torch.from_numpy(x[r]).float().flatten(1) / 255, torch.from_numpy(y[r] % 2).long()) for r in rows
            ]
    return tensors_benchmark(streams["train"], streams["test"], task_labels=[0] * TASKS)


def run(name: str, benchmark: Any, seed: int) -> list[float]:
    """Accuracy on each task after the last."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    strategy = METHODS[name](
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        eval_mb_size=1024,
        evaluator=EvaluationPlugin(accuracy_metrics(epoch=True), loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return [score(model, experience.dataset) for experience in benchmark.test_stream]


@torch.no_grad()
def score(model: nn.Module, dataset: Any) -> float:
    model.eval()
    right: list[Tensor] = []
    for x, y, *_ in torch.utils.data.DataLoader(dataset, batch_size=1024):
        right.append(model(x).argmax(1) == y)
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = tasks(options.npz)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "acc", *(f"task{i}" for i in range(TASKS)), "seconds"])
        for seed in range(options.seeds):
            for name in METHODS:
                start = time.perf_counter()
                found = run(name, benchmark, seed)
                row = [f"{v:.4f}" for v in (sum(found) / TASKS, *found)]
                writer.writerow([name, seed, *row, f"{time.perf_counter() - start:.0f}"])
                file.flush()
                print(f"{name:12} seed {seed}: {row[0]}", flush=True)


if __name__ == "__main__":
    main()
