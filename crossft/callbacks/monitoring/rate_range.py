"""A learning-rate range test over named groups: how the loss answers to ever larger learning rates."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from crossft.callbacks.freezing import GradualUnfreezing
from crossft.errors import ConfigError
from crossft.optim import Schedule
from crossft.runs import replacing, write_atomic
from crossft.tasks import Task

__all__ = ["RateRange"]

_SKIP_FIRST, _SKIP_LAST = 10, 1  # steps that no suggestion is taken from, as in Lightning's learning-rate finder


class _Sweep(Schedule):
    """Factors from ``lowest`` to ``highest``, evenly on a log scale, over ``steps`` optimizer steps."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        self.lowest, self.highest, self.steps = lowest, highest, steps

    def __call__(self, step: int, total: int) -> float:
        share = min(step, self.steps - 1) / (self.steps - 1)
        return float(self.lowest * (self.highest / self.lowest) ** share)


class RateRange(Callback):
    """Raise every group's learning rate by a common factor, step by step, and draw the loss over it.

    The learning-rate range test (Smith 2017, section 3.3) with an exponential sweep. Groups keep their proportions:
    the factor is on each group's own learning rate (layer decay and head multiplier included), and it replaces the
    schedule for this run. Only what trains takes part. Beside ``GradualUnfreezing`` one phase is tested: the model
    trains as in that phase through the whole sweep, from the weights that the run starts with. Those are not what
    earlier phases would have left; to test a late phase as it will begin, start from a run that ended where it does
    (``--init``). The phase's own factor ``lr`` takes no part: the suggestion is what to set it to.
    The suggestion is the factor at which the smoothed loss falls fastest. The run stops when the loss diverges or the
    sweep ends, puts weights, schedule and phases back to where they were, and writes ``lr_range.csv`` and
    ``lr_range.png`` to the run folder.

    Args:
        lowest: first factor.
        highest: last factor.
        steps: optimizer steps of the sweep (100: Lightning's default).
        stop_at: stop when the smoothed loss exceeds this many times its lowest value (4: Lightning's default).
        smoothing: weight of the past in the smoothed loss (0.98: Lightning's).
        phase: the phase of ``GradualUnfreezing`` that is tested, counted from 0.

    Attributes:
        losses: mean loss of each optimizer step so far, over accumulation and processes.
        suggestion: the factor, after training; None where the sweep was too short.

    Raises:
        ConfigError: a setting out of range, a run shorter than the sweep, a resumed run, or a phase that is not there.
    """

    def __init__(
        self,
        lowest: float = 1e-3,
        highest: float = 1e3,
        steps: int = 100,
        stop_at: float = 4.0,
        smoothing: float = 0.98,
        phase: int = 0,
    ) -> None:
        if not 0.0 < lowest < highest:
            raise ConfigError(f"lowest={lowest}, highest={highest}: 0 < lowest < highest, factors on learning rates")
        if steps < 2:
            raise ConfigError(f"steps={steps} must be at least 2")
        if stop_at <= 1.0:
            raise ConfigError(f"stop_at={stop_at} must be above 1: a multiple of the lowest smoothed loss")
        if not 0.0 <= smoothing < 1.0:
            raise ConfigError(f"smoothing={smoothing} must be in [0, 1): weight of the past; 0 smooths nothing")
        self.sweep = _Sweep(lowest, highest, steps)
        if phase < 0:
            raise ConfigError(f"phase={phase} must be at least 0: phases are counted from 0")
        self.stop_at, self.smoothing, self.phase = stop_at, smoothing, phase
        self.name = "range"
        self._former: Schedule | None = None
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.suggestion: float | None = None
        self._window = self._average = 0.0
        self._weights: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"RateRange[{self.name}]"

    @property
    def factors(self) -> list[float]:
        """Factor of each optimizer step so far."""
        return [self.sweep(step, 0) for step in range(len(self.losses))]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the schedule's place before the optimizer is built, and hold the model in the phase to test."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        self._reset()
        phases = _phases(trainer)
        if self.phase and not phases:
            raise ConfigError(
                f"methods.{self.name}.phase={self.phase}: no method of this run has phases; leave phase out, or add "
                "the GradualUnfreezing whose phase is to be tested"
            )
        for method in phases:
            method.hold(pl_module, self.phase)
        self._former, pl_module.schedule = pl_module.schedule, self.sweep

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the sweep fits the run, and keep the weights."""
        total = trainer.estimated_stepping_batches
        if trainer.global_step or total < self.sweep.steps:
            raise ConfigError(
                f"methods.{self.name}.steps={self.sweep.steps} needs a new run of as many optimizer steps; this one "
                f"goes from {trainer.global_step} to {total}: raise trainer.max_epochs or max_steps, or lower steps"
            )
        self._weights = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the loss of an optimizer step; stop at the end of the sweep or where the loss diverges."""
        self._window += float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 < trainer.num_training_batches:
            return
        self.losses.append(self._window)
        self._average = self.smoothing * self._average + (1.0 - self.smoothing) * self._window
        self.smoothed.append(self._average / (1.0 - self.smoothing ** len(self.losses)))
        self._window = 0.0
        diverged = not math.isfinite(self.smoothed[-1]) or self.smoothed[-1] > self.stop_at * min(self.smoothed)
        if diverged or len(self.losses) >= self.sweep.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back, suggest a factor, write the table and the picture."""
        pl_module.load_state_dict(self._weights)
        kept = np.array(self.smoothed[_SKIP_FIRST:-_SKIP_LAST])
        kept = kept[np.isfinite(kept)]
        if len(kept) > 1:
            self.suggestion = self.factors[_SKIP_FIRST + int(np.gradient(kept).argmin())]
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir))
            rates = {g["name"]: g["initial_lr"] for o in trainer.optimizers for g in o.param_groups}
            found = "too few steps for a suggestion"
            if self.suggestion is not None:
                found = f"the loss falls fastest at {self.suggestion:.3g} times each learning rate: " + ", ".join(
                    f"{name} {rate * self.suggestion:.3g}" for name, rate in rates.items() if name.endswith("/decay")
                )
            rank_zero_info(f"methods.{self.name}: {found}; see lr_range.png in {trainer.default_root_dir}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the schedule back, and let phases follow one another again."""
        if isinstance(pl_module, Task) and self._former is not None:
            pl_module.schedule, self._former = self._former, None
            for method in _phases(trainer):
                method.release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same where the run ends with an error."""
        self.on_fit_end(trainer, pl_module)

    def _write(self, folder: Path) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "factor", "loss", "smoothed"))
        writer.writerows(zip(range(len(self.losses)), self.factors, self.losses, self.smoothed))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "lr_range.csv", text.getvalue())
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.factors, self.losses, color="0.75", linewidth=1, label="loss of a step")
        axes.plot(self.factors, self.smoothed, color="#0072B2", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(
                self.suggestion, color="#D55E00", linestyle="--", label=f"falls fastest: {self.suggestion:.3g}"
            )
        finite = [v for v in self.smoothed if math.isfinite(v)]
        if finite:
            axes.set_ylim(0.0, self.stop_at * min(finite))
        axes.set_xscale("log")
        axes.set_xlabel("factor on every learning rate")
        axes.set_ylabel("training loss")
        axes.legend(frameon=False)
        with replacing(folder / "lr_range.png") as temporary:
            figure.savefig(temporary, dpi=144, format="png", metadata={"Software": ""})


def _phases(trainer: Trainer) -> list[GradualUnfreezing]:
    return [c for c in trainer.callbacks if isinstance(c, GradualUnfreezing)]  # type: ignore[attr-defined]
