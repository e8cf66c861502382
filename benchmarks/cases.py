"""The two cases that the benchmarks run: EfficientNet-lite0 on pacs-96 (photo), MiniLM on amazon4-airline (books);
and what `crossft fit` attaches to every run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from crossft.backbones import Backbone, Timm, Transformer
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints, Drift, FiniteCheck, Ledger, RunLog, Stopping
from crossft.cli.profiling import NoProfiler
from crossft.data import DomainData
from crossft.runs import RunFolder
from crossft.tasks import Classification

__all__ = ["BACKBONES", "ROOT", "Build", "in_a_run", "make", "quiet", "text", "vision"]

ROOT = Path(os.environ.get("CROSSFT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
BACKBONES = ("EfficientNet-lite0", "MiniLM")
Build = Callable[[], Backbone]


def vision(rows: int, batch: int = 32, cache: bool = False) -> tuple[Build, DomainData]:
    """Images of 96 x 96, not augmented, all of them training rows."""
    data = DomainData(
        ROOT / "pacs-96", target="photo", batch_size=batch, augment="none", image_size=96, cache_images=cache,
        limit=rows, splits=(1.0, 0.0, 0.0),
    )  # fmt: skip
    data.prepare()
    return lambda: Timm("packaged:efficientnet_lite0", image_size=96), data


def text(rows: int, batch: int = 16) -> tuple[Build, DomainData]:
    """Reviews of at most 128 tokens; of ``rows`` those of the train split train."""
    data = DomainData(ROOT / "amazon4-airline", target="books", batch_size=batch, limit=rows, length_window=0)
    data.prepare()
    return lambda: Transformer("packaged:minilm", max_length=128), data


def make(build: Build, data: DomainData, last: int | None) -> Classification:
    """The task with its last stages training (None: all)."""
    pl.seed_everything(0, verbose=False)
    backbone = build()
    data.bind(backbone.input_spec)
    task = Classification(backbone, list(data.domains))
    names = [s.name for s in backbone.stages]
    if last is not None:
        task.train_stages(names[len(names) - last :])
    return task.train()


@contextmanager
def in_a_run(folder: Path) -> Iterator[tuple[list[pl.Callback], dict[str, Any]]]:
    """Callbacks and settings of the Trainer that every run has, with a new folder; drift watches weights, no rows."""
    RunFolder.create(folder)
    with Stopping() as stopping:
        kept = [Drift(rows=0), Ledger(folder), FiniteCheck(), stopping]
        yield (
            [*kept, Checkpoints(folder, stopping=stopping)],
            {"logger": RunLog(folder), "plugins": AtomicCheckpointIO(), "profiler": NoProfiler()},
        )


def quiet() -> None:
    """One thread, and no words from Lightning."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "transformers", "finetuning_scheduler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
