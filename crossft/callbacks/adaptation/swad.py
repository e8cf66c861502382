"""SWAD: dense weight averaging over the valley of the validation loss (Cha et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from crossft.backbones import batch_norms
from crossft.callbacks.averaging.base import PublishedWeights
from crossft.callbacks.monitoring import Checkpoints
from crossft.callbacks.sharding import refuse_sharded
from crossft.errors import ConfigError
from crossft.tasks import Task

__all__ = ["SWAD", "LossValley"]


class LossValley:
    """Which stretches of training lie in the valley, and the average over them (Cha et al. 2021, algorithm 1).

    A segment is the stretch between two validations: the mean of its weights, how many steps, and the loss at its end.
    The valley starts at the first loss that is the least of ``converge`` in a row; the threshold is ``tolerance`` times
    their mean. It ends before the first ``patience`` losses in a row that all lie above the threshold.

    Args:
        converge: N_s.
        patience: N_e.
        tolerance: r.
    """

    def __init__(self, converge: int, patience: int, tolerance: float) -> None:
        self.converge, self.patience, self.tolerance = converge, patience, tolerance
        self.threshold: float | None = None
        self.ended = False
        self.queue: list[dict[str, Any]] = []  # segments that are not decided on yet
        self.sums: list[Tensor] = []
        self.steps = 0

    def add(self, weights: list[Tensor], steps: int, loss: float) -> None:
        """Take in the next segment."""
        if self.ended:
            return
        self.queue.append({"weights": weights, "steps": steps, "loss": loss})
        losses = [s["loss"] for s in self.queue]
        if self.threshold is None:
            if len(losses) == self.converge and losses[0] == min(losses):
                self.threshold = self.tolerance * sum(losses) / len(losses)
            elif len(losses) == self.converge:
                self.queue.pop(0)
        elif len(losses) >= self.patience and min(losses[-self.patience :]) > self.threshold:
            self._accept(len(self.queue) - self.patience)
            self.queue.clear()
            self.ended = True
        if self.threshold is not None:
            self._accept(len(self.queue) - (self.patience - 1))

    def _accept(self, count: int) -> None:
        for _ in range(max(0, count)):
            segment = self.queue.pop(0)
            scaled = [w.double() * segment["steps"] for w in segment["weights"]]
            self.sums = scaled if not self.sums else [a + b for a, b in zip(self.sums, scaled, strict=True)]
            self.steps += segment["steps"]

    def average(self) -> list[Tensor] | None:
        """Mean weights over the steps in the valley; None where it has not begun. Training has ended."""
        if self.threshold is None:
            return None
        self._accept(len(self.queue))
        return [s / self.steps for s in self.sums]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {"threshold": self.threshold, "ended": self.ended, "queue": list(self.queue), "sums": list(self.sums),
                "steps": self.steps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.threshold, self.ended, self.steps = state["threshold"], state["ended"], state["steps"]
        self.queue, self.sums = list(state["queue"]), list(state["sums"])


class SWAD(Callback):
    """SWAD (Cha et al. 2021, Domain Generalization by Seeking Flat Minima, algorithm 1).

    The weights after every optimizer step are averaged between the first low of the validation loss and the end of
    its valley; at the end of training the average becomes the model, before the last checkpoint is written. Validate
    often (``trainer.val_check_interval``): the paper does every 50 to 300 steps. It reads source validation alone.
    Where the loss never has a first low, the last weights stay, and a warning says so. Checkpoints hold up to
    ``max(converge, patience) + 2`` copies of the weights. The published code starts some averages earlier and counts
    some segments twice; this is the algorithm of the paper.

    Args:
        converge: N_s: the first loss that is the least of so many starts the valley (3 in the paper).
        patience: N_e: so many losses in a row above the threshold end it (6 in the paper).
        tolerance: r: the threshold is r times the mean of the first N_s losses (1.3 in the paper, 1.2 for VLCS).
        monitor: logged value to keep low. Default: the mean of ``NAME/val/loss`` over the source domains.

    Raises:
        ConfigError: an argument out of range, BatchNorm statistics that move, another method that averages weights or
            chooses a checkpoint or ends the fit, a sharded model, or a monitor that is not measured.
    """

    def __init__(
        self, converge: int = 3, patience: int = 6, tolerance: float = 1.3, monitor: str | None = None
    ) -> None:
        if converge < 1 or patience < 1 or tolerance < 1:
            raise ConfigError(
                f"converge={converge}, patience={patience}, tolerance={tolerance}: all must be at least 1"
            )
        self.monitor = monitor
        self.name = "swad"
        self.valley = LossValley(converge, patience, tolerance)
        self._mean: list[Tensor] = []
        self._steps = 0
        self._seen = 0

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"SWAD[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what the average would mean."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        refuse_sharded(trainer, self.name)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in (c for c in callbacks if isinstance(c, PublishedWeights)):
            raise ConfigError(f"methods.{self.name} and methods.{other.name} both choose the weights; set one to null")
        for stopper in (c for c in callbacks if isinstance(c, EarlyStopping)):
            raise ConfigError(
                f"methods.{self.name} ends its average by itself, and {type(stopper).__name__} would end the fit "
                "before that; remove it from trainer.callbacks"
            )
        if any(getattr(c, "monitor", None) for c in callbacks if isinstance(c, Checkpoints)):
            raise ConfigError(
                f"methods.{self.name} chooses the weights by source validation, and select.metric a checkpoint before "
                "they are averaged; set select.metric to null"
            )
        if pl_module.batchnorm != "frozen" and batch_norms(pl_module.backbone):
            raise ConfigError(
                f"methods.{self.name} averages weights, and BatchNorm statistics that move would not fit the average; "
                "set model.batchnorm=frozen (the paper freezes them too)"
            )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights after an optimizer step to the mean of the segment."""
        if trainer.global_step == self._seen or self.valley.ended:
            return
        self._seen = trainer.global_step
        self._steps += 1
        weights = _weights(pl_module)
        if self._steps == 1:
            self._mean = [w.clone() for w in weights]
        else:
            self._mean = [m.to(w.device) for m, w in zip(self._mean, weights, strict=True)]
            torch._foreach_lerp_(self._mean, weights, 1.0 / self._steps)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the segment with the validation loss."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._steps:
            return
        self.valley.add([w.cpu() for w in self._mean], self._steps, self._loss(trainer, pl_module))
        self._mean, self._steps = [], 0

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> float:
        assert isinstance(pl_module, Task)
        names = [pl_module.evaluation.names[d.name] for d in pl_module.domains if d.role == "source"]
        keys = [self.monitor] if self.monitor else [f"{name}/val/loss" for name in names]
        missing = [k for k in keys if k not in trainer.callback_metrics]
        if missing or not keys:
            known = ", ".join(sorted(k for k in trainer.callback_metrics if "/val/" in k)) or "nothing"
            raise ConfigError(f"methods.{self.name} needs {missing or 'a source'}; validation measures {known}")
        return float(sum(float(trainer.callback_metrics[k]) for k in keys) / len(keys))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last epoch, make the average the model; the checkpoint that is saved next holds it."""
        if not _is_last(trainer):
            return
        average = self.valley.average()
        if average is None:
            rank_zero_warn(f"methods.{self.name}: the validation loss has no first low; the last weights stay")
            return
        for weight, mean in zip(_weights(pl_module), average, strict=True):
            weight.copy_(mean)
        rank_zero_info(f"methods.{self.name}: the model is the average over {self.valley.steps} steps")

    def state_dict(self) -> dict[str, Any]:
        """The valley so far and the segment that is under way."""
        return {**self.valley.state_dict(), "mean": list(self._mean), "mean_steps": self._steps, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.valley.load_state_dict(state_dict)
        self._mean, self._steps = list(state_dict["mean"]), state_dict["mean_steps"]
        self._seen = state_dict["seen"]


def _weights(module: LightningModule) -> list[Tensor]:
    assert isinstance(module, Task)
    return [p.detach() for p in (*module.backbone.parameters(), *module.heads.parameters())]


def _is_last(trainer: Trainer) -> bool:
    epochs = trainer.max_epochs
    over = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return over or 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop
