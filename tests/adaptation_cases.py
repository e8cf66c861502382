"""Every method of adaptation and generalization, as small as it goes; and one tiny fit to try them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from tiny import TinyVision

from crossft.backbones.batchnorm import BatchNormPolicy
from crossft.callbacks.adaptation import (
    AFN,
    BNM,
    BSP,
    CDAN,
    CMD,
    CORAL,
    DANN,
    IRM,
    JAN,
    MCC,
    MCD,
    MDD,
    MMD,
    SWAD,
    DomainMixup,
    EntropyMinimization,
    Fishr,
    GroupDRO,
    InterDomainMixup,
    MeanTeacher,
    PseudoLabels,
    VREx,
)
from crossft.data import DomainData
from crossft.tasks import Classification

__all__ = ["CASES", "Case", "data_of", "fit"]

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Case:
    """A method to try.

    Attributes:
        make: builds it at a weight.
        weight: at which it moves the tiny model.
        sources: whether it generalizes from several sources; else it adapts one source to a target.
        rows: whether it is a mean over rows, so accumulation gives the same weights.
        processes: whether two processes give the weights of one.
    """

    make: Callable[[float], Callback]
    weight: float = 1.0
    sources: bool = False
    rows: bool = False
    processes: bool = True


CASES = {
    "dann-tokens": Case(lambda w: DANN(w, hidden=8, tokens=True), rows=True),
    "dann-stage": Case(lambda w: DANN(w, hidden=8, layer="middle", multi=True), rows=True),
    "cdan": Case(lambda w: CDAN(w, hidden=8), rows=True),
    "cdan-e-random": Case(lambda w: CDAN(w, entropy=True, map="randomized", random_dim=6, hidden=8), rows=True),
    "mdd": Case(lambda w: MDD(w, hidden=8, strength=1.0), rows=True),
    "mcd": Case(lambda w: MCD(w), rows=True),
    "bsp": Case(lambda w: BSP(w), 0.01),
    "mmd": Case(lambda w: MMD(w, layers=("middle", "features")), 0.1),
    "mmd-linear": Case(lambda w: MMD(w, estimator="linear")),
    "jan": Case(lambda w: JAN(w)),
    "coral": Case(lambda w: CORAL(w), 100.0),
    "cmd": Case(lambda w: CMD(w)),
    "mcc": Case(lambda w: MCC(w)),
    "bnm": Case(lambda w: BNM(w)),
    "entropy": Case(lambda w: EntropyMinimization(w), rows=True),
    "safn": Case(lambda w: AFN(w), rows=True),
    "hafn": Case(lambda w: AFN(w, variant="hard", radius=2.0)),
    "pseudo": Case(lambda w: PseudoLabels(w, threshold=0.5, ramp=0.5), rows=True),
    "pseudo-adaptive": Case(lambda w: PseudoLabels(w, threshold="adaptive", balance=True, momentum=0.5), rows=True),
    "teacher": Case(lambda w: MeanTeacher(w, decay=0.5), 30.0, rows=True),
    "groupdro": Case(lambda w: GroupDRO(w, eta=0.5), sources=True),
    "irm": Case(lambda w: IRM(w, anneal=0.4), 2.0, sources=True),
    "vrex": Case(lambda w: VREx(w, anneal=0.4), 5.0, sources=True),
    "fishr": Case(lambda w: Fishr(w, anneal=0.4), 20.0, sources=True),
    "domain-mixup": Case(lambda w: DomainMixup(w, "cutmix", 1.0), processes=False),
    "mixup": Case(lambda w: InterDomainMixup(w, alpha=1.0), sources=True, processes=False),
    "coral-sources": Case(lambda w: CORAL(w, between="sources", layers=("features",)), 100.0, sources=True),
}
SWAD_CASE = Case(lambda w: SWAD(converge=1, patience=9), sources=True, rows=True)


def data_of(root: Path, sources: bool, accumulation: int = 1, **kwargs) -> DomainData:
    """16 rows an optimizer step, whatever the processes: one source and a target without labels, or two sources."""
    if sources:
        kwargs = {"source": ["photo", "art"], "train_on": "source", "sampler": "domain", **kwargs}
    else:
        kwargs = {"source": "photo", "target": "sketch", "train_on": "source", "target_labels": "none", **kwargs}
    data = DomainData(root, batch_size=16 // (WORLD * accumulation), augment="none", seed=5, **kwargs)
    data.prepare()
    return data


def fit(
    data: DomainData,
    methods: dict[str, Callback],
    accumulation: int = 1,
    dropout: float = 0.0,
    ckpt_path: Path | None = None,
    extra: tuple[Callback, ...] = (),
    backbone: TinyVision | None = None,
    batchnorm: Literal["auto"] | BatchNormPolicy = "auto",
    **trainer_args,
) -> tuple[Trainer, Classification]:
    """Train a tiny model for 4 steps."""
    seed_everything(1, verbose=False)
    for name, method in methods.items():
        method.name = name
    task = Classification(
        backbone or TinyVision(dropout=dropout),
        list(data.domains),
        batchnorm=batchnorm,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    )
    trainer = Trainer(
        **{"max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": False, **trainer_args},
        accumulate_grad_batches=accumulation,
        callbacks=[*methods.values(), *extra],
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, task
