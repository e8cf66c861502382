"""Every method of retention and averaging, as small as it goes; and one tiny target leg to try them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from tiny import TinyVision, image_domains

from crossft.callbacks.averaging import EMA, SWA, WiSEFT
from crossft.callbacks.retention import (
    AGEM,
    BSS,
    DELTA,
    EWC,
    L2SP,
    MAS,
    R3F,
    SI,
    SMART,
    CoTuning,
    DERPlusPlus,
    DriftLimit,
    FeatureDistillation,
    LwF,
    Mixout,
    OnlineEWC,
    Replay,
    StochNorm,
)
from crossft.data import DomainData
from crossft.optim import RecAdam
from crossft.tasks import Classification

__all__ = ["CASES", "Case", "data_of", "fit", "images"]

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Case:
    """A method to try.

    Attributes:
        make: builds it at a weight; methods without one take 0 for off, where they can be off.
        weight: at which it moves the tiny model.
        off: whether weight 0 leaves the model's weights as they are without it.
        target: the target domain; ``art`` has labels of its own.
        rows: whether accumulation gives the same weights.
        batchnorm: whether the backbone has BatchNorm whose statistics train.
    """

    make: Callable[[float], Callback]
    weight: float = 1.0
    off: bool = True
    target: str = "sketch"
    rows: bool = True
    batchnorm: bool = False


CASES = {
    "l2sp": Case(lambda w: L2SP(w), 0.5),
    "ewc": Case(lambda w: EWC(w, chunk=5), 100.0),
    "ewc-sampled": Case(lambda w: EWC(w, labels="sampled", samples=20), 100.0),
    "ewc-empirical": Case(lambda w: EWC(w, labels="empirical"), 100.0),
    "online-ewc": Case(lambda w: OnlineEWC(w), 100.0),
    "mas": Case(lambda w: MAS(w), 10.0),
    "si": Case(lambda w: SI(w), 1.0, off=False),
    "lwf": Case(lambda w: LwF(w), 30.0),
    "lwf-own-head": Case(lambda w: LwF(w, rows="all"), 30.0, target="art"),
    "features": Case(lambda w: FeatureDistillation(w), 30.0),
    "features-stages": Case(lambda w: FeatureDistillation(w, stages=["stem", "middle"]), 30.0),
    "delta": Case(lambda w: DELTA(w, samples=6), 30.0),
    "delta-uniform": Case(lambda w: DELTA(w, attention="uniform", stages=["last"]), 30.0),
    "bss": Case(lambda w: BSS(w, k=2), 1.0, rows=False),
    "r3f": Case(lambda w: R3F(w, epsilon=0.5), 5.0),
    "smart": Case(lambda w: SMART(w, epsilon=0.5, sigma=0.2, step_size=0.2, steps=2), 5.0),
    "cotuning": Case(lambda w: CoTuning(w), 2.0, target="art"),
    "replay": Case(lambda w: Replay(size=9, share=0.5), off=False),
    "replay-herding": Case(lambda w: Replay(size=9, keep="herding"), off=False),
    "der": Case(lambda w: DERPlusPlus(w, size=9), 10.0),
    "der-unlabeled": Case(lambda w: DERPlusPlus(w, size=9, keep="reservoir", labels=False), 10.0),
    "agem": Case(lambda w: AGEM(size=9, batch_size=6), off=False, target="flipped"),
    "mixout": Case(lambda w: Mixout(p=w), 0.7),
    "stochnorm": Case(lambda w: StochNorm(p=w), 0.5, off=False, rows=False, batchnorm=True),
    "drift": Case(lambda w: DriftLimit(radius=w), 0.01, off=False),
    "ema": Case(lambda w: EMA(decay=w), 0.9, off=False),
    "swa": Case(lambda w: SWA(start=0.3), off=False),
    "wiseft": Case(lambda w: WiSEFT(alpha=1.0 - w), 0.5),
}


def images(folder: Path) -> Path:
    """photo and sketch with the same two classes, flipped with the two the other way round, art with three others.

    23 rows a class: no batch divides them.
    """
    image_domains(folder, domains=("photo", "sketch"), each=23)
    image_domains(folder, domains=("flipped",), classes=("dog", "cat"), each=23)
    return image_domains(folder, domains=("art",), classes=("red", "green", "blue"), each=15)


def data_of(root: Path, accumulation: int = 1, target: str = "sketch", **kwargs) -> DomainData:
    """A target leg of 16 rows an optimizer step, whatever the processes; the source trains nothing by itself."""
    kwargs = {"source": "photo", "target": target, "train_on": "target", "augment": "none", **kwargs}
    data = DomainData(root, batch_size=16 // (WORLD * accumulation), seed=5, **kwargs)
    data.prepare()
    return data


def fit(
    data: DomainData,
    methods: dict[str, Callback],
    accumulation: int = 1,
    dropout: float = 0.0,
    batchnorm: bool = False,
    ckpt_path: Path | None = None,
    extra: tuple[Callback, ...] = (),
    optimizer: Callable | None = None,
    **trainer_args,
) -> tuple[Trainer, Classification]:
    """Train a tiny model for 4 steps."""
    seed_everything(1, verbose=False)
    for name, method in methods.items():
        method.name = name
    task = Classification(
        TinyVision(dropout=dropout, batchnorm=batchnorm),
        list(data.domains),
        batchnorm="training" if batchnorm else "auto",
        optimizer=optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    )
    trainer = Trainer(
        **{"max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": False, "logger": False, **trainer_args},
        accumulate_grad_batches=accumulation,
        callbacks=[*methods.values(), *extra],
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, task


def recalling(p) -> RecAdam:
    """RecAdam in the middle of its annealing."""
    return RecAdam(p, lr=0.05, rate=1.0, middle=2.0, pull=5.0)
