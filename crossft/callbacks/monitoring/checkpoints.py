"""Saves at optimizer-step boundaries, so that a run that is killed resumes to the same bits."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_only

from crossft.callbacks.monitoring.anchors import Anchors
from crossft.callbacks.monitoring.checkpoint_io import AtomicCheckpointIO, by_step, check, latest_valid, publish
from crossft.callbacks.monitoring.stopping import Stopping
from crossft.errors import CheckpointError, ConfigError, Interrupted
from crossft.runs import RunFolder
from crossft.tasks import Task

__all__ = ["Checkpoints"]


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step-N.ckpt``, and ``last.ckpt`` and ``best.ckpt`` as further names of them.

    A save happens at the end of every epoch, after validation, and every ``every_minutes`` or ``every_n_steps`` in
    between; on a signal at the next such boundary, on all processes together. It holds every process's RNG.
    Every validation chooses: the best model so far is saved as it was validated. Between the optimizer steps of an
    accumulation that is ``best.ckpt`` alone: a model, and no place to resume at.
    Use it with ``AtomicCheckpointIO`` among the trainer's plugins.

    Args:
        folder: the run folder.
        every_minutes: minutes between saves within an epoch, on the first process's clock; None: never by time.
        every_n_steps: optimizer steps between saves within an epoch; None: never by count.
        keep: number of step checkpoints kept; the newest valid one is what a resume takes.
        monitor: validation metric that ``best.ckpt`` maximizes or minimizes; None keeps no best.
        mode: ``max`` or ``min``.
        wandb_id: of the run's W&B run; kept in every checkpoint.
        stopping: takes the signals; one of its own by default.

    Raises:
        ConfigError: ``every_n_steps`` or ``keep`` below 1, or ``every_minutes`` not positive.
    """

    def __init__(
        self,
        folder: Path | str,
        every_minutes: float | None = 10.0,
        every_n_steps: int | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: str = "max",
        wandb_id: str = "",
        stopping: Stopping | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1; null saves at epoch ends only")
        if every_minutes is not None and every_minutes <= 0:
            raise ConfigError(f"every_minutes={every_minutes} must be positive; null never saves by time")
        if keep < 1:
            raise ConfigError(f"keep={keep} must be at least 1: a resume needs a checkpoint")
        self.folder = RunFolder(folder)
        self.every_minutes, self._saved_at = every_minutes, time.monotonic()
        self.every_n_steps, self.keep, self.monitor, self.mode = every_n_steps, keep, monitor, mode
        self.wandb_id = wandb_id
        self.best_score: float | None = None
        self.best_step = self.saved_step = -1
        self._pending = False
        self._rng: dict[str, Any] | None = None
        self.stopping = stopping or Stopping()

    # -- life cycle --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terms a place for their constant tensors."""
        if stage == "fit" and isinstance(pl_module, Task):
            pl_module.attachments.anchors = Anchors(self.folder.anchors, write=trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put every RNG back after a resume, and take the signals: the handler sets a flag, nothing else.

        This callback is the last, so what others draw while starting does not count, and what they draw at the next
        batch or epoch comes from the saved state. Lightning puts the former signal handler back after the fit.

        With ``max_steps`` set, Lightning takes every resume for one within an epoch, and would end an epoch that had
        ended a second time: its hooks, its place in the log, and one epoch less of ``max_epochs``. It is told so.
        """
        self.stopping.take(training=True)
        if trainer.fit_loop.restarted_on_epoch_end:
            _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]
            trainer.fit_loop.reset()
        if self._rng is not None:
            _set_rng(self._rng)
            self._rng = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due; at the last batch, or before a validation, the save waits until that is done."""
        told = self._pending or self.stopping.received is not None
        if trainer.world_size == 1 and not (told or self._due(trainer.global_step)):
            return
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if loop._should_accumulate() or _ends_epoch(trainer):
            return
        assert fetcher is not None
        due = self._pending or (trainer.is_global_zero and self._due(trainer.global_step))
        self._pending = self._wanted(trainer, due)
        if self._pending and not loop._should_check_val_fx(fetcher):
            if trainer.strategy.reduce_boolean_decision(self.stopping.received is not None, all=False):
                trainer._logger_connector.update_train_step_metrics()  # the stop below is before Lightning's own turn
            self._save(trainer)
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model if it is the best so far, and what waited; at the last batch the epoch's own save does both.

        Between optimizer steps only ``best.ckpt`` is written: nothing can resume there.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        improved = trainer.strategy.reduce_boolean_decision(self._improve(trainer), all=False)
        if _ends_epoch(trainer):
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():
            if improved:
                trainer.save_checkpoint(self.folder.best)
        elif self._wanted(trainer, improved or self._pending):
            self._save(trainer)
            self._stop_if_told(trainer)

    def _wanted(self, trainer: Trainer, due: bool) -> bool:
        """Whether a save is due, or a signal came, in any process."""
        return bool(trainer.strategy.reduce_boolean_decision(due or self.stopping.received is not None, all=False))

    def _due(self, step: int) -> bool:
        by_count = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_time = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return by_count or by_time

    def _stop_if_told(self, trainer: Trainer) -> None:
        """Stop in all processes where any was told to; every one has saved."""
        told, anywhere = self.stopping, trainer.strategy.reduce_boolean_decision
        if anywhere(told.received is not None, all=False):
            requeue = anywhere(told.requeue, all=False)
            word = told.received.name if told.received is not None else "a signal to another process"
            raise Interrupted(f"stopped by {word} at optimizer step {trainer.global_step}, after saving", requeue)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after validation and after all other callbacks."""
        self._save(trainer)
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a fit that stopped within an epoch has reached."""
        if self.saved_step != trainer.global_step:
            self._save(trainer)
        self._stop_if_told(trainer)

    # -- saving ------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer) -> None:
        self.saved_step, self._pending = trainer.global_step, False
        path = self._path(self.saved_step)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            publish(path, "last.ckpt")
            if self.best_step == self.saved_step:
                publish(path, "best.ckpt")
            self._prune(trainer)
        self._saved_at = time.monotonic()
        trainer.strategy.barrier("crossft checkpoint")

    def _path(self, step: int) -> Path:
        return self.folder.checkpoints / f"step-{step}.ckpt"

    def _improve(self, trainer: Trainer) -> bool:
        """Whether the model just validated is the best so far; one without a finite score chooses nothing."""
        if self.monitor is None:
            return False
        if self.monitor not in trainer.callback_metrics:
            known = sorted(k for k in trainer.callback_metrics if "/val/" in k)
            raise ConfigError(f"select={self.monitor!r} was not measured; validation gives {', '.join(known)}")
        score, best = float(trainer.callback_metrics[self.monitor]), self.best_score
        better = best is None or (score > best if self.mode == "max" else score < best)
        if not (better and math.isfinite(score)):
            return False
        self.best_score, self.best_step = score, trainer.global_step
        return True

    def _prune(self, trainer: Trainer) -> None:
        """Keep the checkpoint just saved and the newest before it, ``keep`` in all."""
        before = [path for step, path in by_step(self.folder.checkpoints).items() if step < self.saved_step]
        for path in before[self.keep - 1 :]:
            trainer.strategy.remove_checkpoint(path)

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Best score and steps; every process's RNG is gathered here, so all processes must save together."""
        states: list[Any] = [_get_rng()]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, _get_rng())
        steps = {"saved_step": self.saved_step, "best_step": self.best_step}
        return {"best_score": self.best_score, **steps, "wandb_id": self.wandb_id, "rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this process's RNG until the first batch."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if len(state_dict["rng"]) != world:
            raise CheckpointError(
                f"the checkpoint was saved by {len(state_dict['rng'])} processes, this run has {world}; "
                "resume with the same number, or start a new run from it with --init"
            )
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self.saved_step = state_dict["saved_step"]
        self._rng = state_dict["rng"][dist.get_rank() if world > 1 else 0]
        if not getattr(rank_zero_only, "rank", 0):
            self._mend()

    def _mend(self) -> None:
        """Finish what a kill between a save and its publication left undone, and remove half-written files.

        Damaged checkpoints of later steps go, so that none of them is ever kept in place of a good one.
        """
        for step, later in by_step(self.folder.checkpoints).items():
            if step > self.saved_step:
                try:
                    check(later)
                except CheckpointError:
                    AtomicCheckpointIO().remove_checkpoint(later)
        path = self._path(self.saved_step)
        if path.is_file():
            publish(path, "last.ckpt")
            if self.best_step == self.saved_step:
                publish(path, "best.ckpt")
        for half in self.folder.checkpoints.glob(".tmp-*"):
            half.unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """The newest valid checkpoint of the run."""
        return latest_valid(self.folder.checkpoints)


def _ends_epoch(trainer: Trainer) -> bool:
    """Whether no batch follows in this epoch, so that its own save is next."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop.done or loop._is_training_done)  # right after a resume, ``done`` alone waits for a validation


def _get_rng() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
