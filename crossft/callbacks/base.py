"""The base of every method."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from crossft.data.passes import training_rows
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import GradientProjection, LossTerm, WeightPenalty

__all__ = ["MethodCallback", "method_seed"]


class MethodCallback(Callback, ABC):
    """A method that attaches one loss term, weight penalty or gradient projection to the task.

    ``setup("fit")`` builds and attaches it: before DDP wraps, before the optimizer is built, before a checkpoint is
    restored. It is built under an RNG of its own, seeded by the run's seed and the method's name, so that switching
    one method on does not move another.

    Args:
        weight: what the task multiplies the term's value by; 0 leaves the model's weights as they would be without.

    Raises:
        ConfigError: the weight is negative, or the data does not have what the method needs.
    """

    needs_source: Literal["none", "unlabeled", "labeled"] = "none"
    """What the method needs of the source in every training batch."""
    needs_target: Literal["none", "unlabeled"] = "none"
    """Whether the method needs unlabeled target rows in every training batch."""
    reads_source: Literal["none", "unlabeled", "few", "all"] = "none"
    """What the method reads of the source's training split outside of the batches: nothing, inputs alone, some labeled
    rows (a memory), or all labeled rows. The fit refuses to start where it is not there."""

    def __init__(self, weight: float = 1.0) -> None:
        if weight < 0:
            raise ConfigError(f"weight={weight} must be >= 0; 0 switches the method's effect off")
        self.weight = weight
        self.name = type(self).__name__.lower()

    @abstractmethod
    def build(self, task: Task) -> LossTerm | WeightPenalty | GradientProjection:
        """Build the term; called once a fit, on every process, under the method's own RNG."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the data the method needs, build the term and attach it."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for role, need in (("source", self.needs_source), ("target", self.needs_target)):
            if need != "none":
                data.include(role, labels=need == "labeled")
        if self.reads_source != "none":
            training_rows(data, "source", labeled=self.reads_source != "unlabeled")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(method_seed(self.name))  # torch.manual_seed reseeds GPUs too
            pl_module.attach(self.name, self.build(pl_module), self.weight)

    @property
    def state_key(self) -> str:
        """The method's name is part of its key, so two of one class stay apart."""
        return f"{type(self).__qualname__}[{self.name}]"


def method_seed(name: str) -> int:
    """Seed of a method's own RNG: from the run's global seed and the method's name, the same on every process."""
    seed = os.environ.get("PL_GLOBAL_SEED", "0")
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")
