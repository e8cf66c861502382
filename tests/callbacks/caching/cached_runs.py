"""Short runs of a tiny task with and without the prefix cache; shared by the tests of this folder and their worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from tiny import TinyVision
from torch.nn.parallel import DistributedDataParallel

from crossft.callbacks.caching import PrefixCache
from crossft.data import DomainData
from crossft.tasks import Classification

__all__ = ["Phases", "fit", "image_data", "metrics", "text_data", "warned"]

DROPS = partial(TinyVision, dropout=0.2)


class Phases(Callback):
    """Train the last k stages from optimizer step s on, for each (s, k); wraps DDP again where there is one."""

    def __init__(self, phases: dict[int, int]) -> None:
        self.phases, self.now = phases, -1

    def _apply(self, trainer: Any, task: Any) -> None:
        last = self.phases[max(s for s in self.phases if s <= trainer.global_step)]
        if last != self.now:
            self.now = last
            names = [s.name for s in task.backbone.stages]
            task.train_stages(names[len(names) - last :])
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                rewrap(trainer.strategy, task)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._apply(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._apply(trainer, pl_module)


def rewrap(strategy: Any, task: Any) -> None:
    strategy.model = task
    strategy.configure_ddp()


def image_data(root: Path, **options: Any) -> DomainData:
    options = {"source": "photo", "target": "sketch", "train_on": ["source", "target"], "augment": "none", **options}
    data = DomainData(root, **{"batch_size": 8, **options})
    data.prepare()
    return data


def fit(
    data: DomainData,
    phases: dict[int, int] | int | None,
    cache: PrefixCache | None,
    backbone: Callable[[], Any] = DROPS,
    *,
    methods: Sequence[Callback] = (),
    task_options: dict[str, Any] | None = None,
    resume: Path | None = None,
    lr: float = 0.1,
    **options: Any,
) -> tuple[Classification, Trainer]:
    """Three epochs (a validation after each) of the last k stages, of phases, or of what the backbone lets train."""
    seed_everything(1, verbose=False)
    task = Classification(
        backbone(),
        list(data.domains),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        **(task_options or {}),
    )
    trainer = Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **options},
        callbacks=[
            *([cache] if cache else []),
            *methods,
            *([] if phases is None else [Phases({0: phases} if isinstance(phases, int) else phases)]),
        ],
        logger=False,
        enable_checkpointing=any(isinstance(m, Checkpoint) for m in methods),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return task, trainer


def text_data(folder: Path, **options: Any) -> DomainData:
    options = {"source": "books", "target": "kitchen", "train_on": ["source", "target"], **options}
    data = DomainData(folder / "data", **{"batch_size": 8, **options})
    data.prepare()
    return data


def metrics(trainer: Any) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "methods.cache" in str(w.message)]
