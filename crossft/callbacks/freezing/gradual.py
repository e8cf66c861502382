"""Gradual unfreezing: phases with their own trainable parameters, equal on all processes and after a resume."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from crossft.callbacks.freezing.course import check_reach, course_of
from crossft.callbacks.freezing.phases import Phase, check_plan, planned_steps, thawing
from crossft.callbacks.freezing.selection import refuse_another
from crossft.callbacks.freezing.wrapping import refuse_unwrappable, rewrap
from crossft.errors import CheckpointError, ConfigError
from crossft.optim import Phased, reset_moments_, set_rates_
from crossft.tasks import Task

__all__ = ["GradualUnfreezing"]


class GradualUnfreezing(Callback):
    """Gradual unfreezing (Howard & Ruder 2018, ULMFiT, section 3.3) and any other phases.

    Each phase has its own trainable parameters, its own end, and says what becomes of the optimizer.
    ULMFiT: ``every: {epochs: 1}, first: 1``. LP-FT (Kumar et al. 2022): the phases ``{train_last: 0, epochs: n}`` and
    ``{}``, the second with a smaller ``lr`` and ``rates: restart``.

    A change happens where an optimizer step begins, on every process at the same step: gradients of what freezes
    are dropped, DDP is wrapped again, and the processes' weights are compared. A checkpoint holds the phase, so a
    resumed run is in the phase that it was in. What trains is checked at each change, after each validation and after
    a resume. A run that cannot reach its last phase is refused when training starts; one that does not, as its metric
    never stood still, ends with a warning.

    Args:
        phases: the phases, in order; the last lasts to the end of training.
        every: or: length and policies of phases that thaw the backbone stage by stage, from the head down.
        first: with ``every``: stages that train in the first phase (0: the head alone).
        by: with ``every``: stages that thaw at each change.
        monitor: validation metric, or ``gap/val/mmd`` of ``DomainGap``, that ``patience`` and
            ``restore_best`` follow. Every phase begins with a best value and a count of its own.
        mode: ``max`` where more is better, else ``min``.
        min_delta: smallest change that counts as an improvement.

    Attributes:
        whole: whether the fit is a whole run; false lets one be cut short (to time its steps) without reaching the
            last phase.

    Raises:
        ConfigError: neither or both of ``phases`` and ``every``, phases that cannot follow one another, a strategy
            that cannot change what trains, a run too short (or with too few validations) for its last phase, or,
            while training, a metric that is not measured.
        CheckpointError: a checkpoint of a run with other phases.
        TrainingError: while training, where processes differ or something else has changed what trains.
    """

    def __init__(
        self,
        phases: list[Phase] | None = None,
        every: Phase | None = None,
        first: int = 0,
        by: int = 1,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
    ) -> None:
        if (phases is None) == (every is None):
            raise ConfigError("give exactly one of phases (each one spelled out) and every (stage by stage)")
        if mode not in ("max", "min"):
            raise ConfigError(f"mode={mode!r} is unknown; allowed: max, min")
        if phases is not None:
            check_plan(phases, monitor)
        elif every is not None and not every.lengths:
            raise ConfigError("every has no length; give one of epochs, steps, share, patience")
        self.phases, self.every, self.first, self.by = phases, every, first, by
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.name = "unfreeze"
        self.whole = True
        self._held: int | None = None
        self.plan: list[Phase] = []
        self._task: Task | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.index, self.start_step, self.start_epoch, self._length = 0, 0, 0, 0
        self._chosen: frozenset[str] = frozenset()
        self._resumed = False
        self._forget()

    def _forget(self) -> None:
        """A phase begins with no best value and no count."""
        self._best: float | None = None
        self._bad, self._over = 0, False
        self._weights: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback's state."""
        return f"GradualUnfreezing[{self.name}]"

    @property
    def phase(self) -> Phase:
        """The phase that trains now."""
        return self.plan[self.index]

    # -- beginning ---------------------------------------------------------------------------------------------

    def plan_for(self, task: Task) -> list[Phase]:
        """The phases for this task's backbone; each is tried, so that a wrong name fails before training.

        Raises:
            ConfigError, StageError: a phase cannot work with this backbone.
        """
        plan = self.phases
        if self.every is not None:
            plan = thawing(self.every, len(task.backbone.stages), self.first, self.by)
        assert plan is not None
        check_plan(plan, self.monitor)
        for phase in plan:
            phase.names(task.backbone)
        return plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enter the first phase before DDP wraps and before the optimizer is built."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Task):
            raise ConfigError(f"methods.{self.name} needs a crossft task, not a {type(pl_module).__name__}")
        refuse_unwrappable(trainer, self.name)
        self._start_over()
        self._task, self.plan = pl_module, self.plan_for(pl_module)
        sharded = isinstance(getattr(trainer, "strategy", None), ModelParallelStrategy)
        if sharded and any(phase.restore_best for phase in self.plan):
            raise ConfigError(
                f"methods.{self.name}: restore_best keeps whole weights, and trainer.strategy=ModelParallelStrategy "
                "cuts them over the processes; set restore_best: false, or use trainer.strategy=ddp"
            )
        if self._held is None:
            pl_module.schedule = Phased(getattr(pl_module.schedule, "base", pl_module.schedule))
        self.index = self._held or 0
        self._chosen = self.phase.apply(pl_module)
        trained = frozenset().union(*(phase.names(pl_module.backbone) for phase in self.plan))
        owned = {id(p) for n, p in pl_module.backbone.named_parameters() if n in trained}
        stages = pl_module.backbone.stages
        pl_module.thawing = frozenset(s.name for s in stages if any(id(p) in owned for p in s.parameters()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No phase is to come any more."""
        if isinstance(pl_module, Task) and stage == "fit":
            pl_module.thawing = frozenset()

    def hold(self, task: Task, index: int) -> None:
        """Train one phase alone, for the whole fit and under another's schedule; until `release`.

        It may be called before or after ``setup``, whichever the order of the callbacks brings.

        Args:
            task: whose phase it is.
            index: of the phase, from 0.

        Raises:
            ConfigError: there is no such phase, or it cannot work with this backbone.
        """
        self.plan = self.plan_for(task)
        if not 0 <= index < len(self.plan):
            raise ConfigError(
                f"phase={index} must be between 0 and {len(self.plan) - 1}: methods.{self.name} has {len(self.plan)} "
                "phases, counted from 0"
            )
        self._held = self.index = index
        self._chosen = self.phase.apply(task)

    def release(self, task: Task) -> None:
        """Let the phases follow one another again; the task is back in the first."""
        self._held, self.index = None, 0
        self._chosen = self.phase.apply(task)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the last phase can be reached, and know the length of the first.

        A resumed run goes on with what it has restored.

        Raises:
            ConfigError: it cannot.
            TrainingError: a second method has changed what trains.
        """
        if isinstance(pl_module, Task):
            refuse_another(pl_module, self._chosen, self.name)
        if self._held is not None:
            return
        if self._resumed:
            if self._over and self.index == len(self.plan) - 1:
                trainer.should_stop = True
        elif isinstance(pl_module, Task):
            course = course_of(trainer)
            if self.whole and course is not None:
                check_reach(self.plan, course, self.name)
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of phases that were never entered."""
        missed = len(self.plan) - 1 - self.index
        if missed and self.whole and self._held is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            never = ", ".join(str(i) for i in range(self.index + 1, len(self.plan)))
            rank_zero_warn(
                f"methods.{self.name}: training ended in phase {self.index} of {len(self.plan)} (counted from 0) at "
                f"optimizer step {trainer.global_step}; never entered: phase {never}. What thaws there has not "
                "trained: lower patience, validate more often, make phases shorter, or train for longer"
            )

    # -- changes -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Where an optimizer step begins: enter the next phase when this one is over."""
        if batch_idx % trainer.accumulate_grad_batches or not isinstance(pl_module, Task):
            return
        if self._ended(trainer):
            self._advance(trainer, pl_module)

    def _ended(self, trainer: Trainer) -> bool:
        if self.index == len(self.plan) - 1 or self._held is not None:
            return False
        if self.phase.epochs is not None:
            return trainer.current_epoch - self.start_epoch >= self.phase.epochs
        if self.phase.patience is not None:
            return self._over
        return trainer.global_step - self.start_step >= self._length

    def _advance(self, trainer: Trainer, task: Task) -> None:
        """Leave this phase and enter the next."""
        if self._weights is not None:
            task.load_state_dict(self._weights)
        self.index += 1
        self.start_step, self.start_epoch = trainer.global_step, trainer.current_epoch
        self._forget()
        self._chosen = self.phase.apply(task)
        if self.phase.moments == "reset":
            for optimizer in trainer.optimizers:
                reset_moments_(optimizer)
        self._begin(trainer, task)
        rewrap(trainer, task)
        frozen = ", ".join(sorted(task.frozen_stages)) or "nothing"
        rank_zero_info(
            f"methods.{self.name}: phase {self.index + 1} of {len(self.plan)} from optimizer step {self.start_step}, "
            f"frozen: {frozen}"
        )

    def _begin(self, trainer: Trainer, task: Task) -> None:
        """Set the schedule of the phase, and the learning rates of its first step."""
        total = int(trainer.estimated_stepping_batches)
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self._length = planned_steps(self.phase, self.start_step, total, steps_per_epoch)
        schedule, phase = self._phased(task), self.phase
        schedule.begin(self.start_step, self._length, phase.rates, phase.warmup, phase.lr)
        for optimizer in trainer.optimizers:
            set_rates_(optimizer, schedule(trainer.global_step, total))

    def _phased(self, task: Task) -> Phased:
        if not isinstance(task.schedule, Phased):
            raise ConfigError(
                f"methods.{self.name} sets the schedule's phases, and another method has put a "
                f"{type(task.schedule).__name__} in its place; set one of the two methods to null"
            )
        return task.schedule

    # -- the monitored metric ----------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count validations without improvement; the first process's value decides for all."""
        phase = self.phase
        watches = self._held is None and (phase.patience or phase.restore_best)
        if trainer.sanity_checking or not watches:
            return
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(k for k in trainer.callback_metrics if "/val/" in k)) or "nothing"
            raise ConfigError(f"methods.{self.name}.monitor={self.monitor!r} was not measured; there is {known}")
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if self._improves(value):
            self._best, self._bad = value, 0
            if phase.restore_best:
                self._weights = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}
            return
        self._bad += 1
        if phase.patience is not None and self._bad >= phase.patience:
            self._over = True
            if self.index == len(self.plan) - 1:
                trainer.should_stop = True

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self._best is None:
            return True
        change = value - self._best if self.mode == "max" else self._best - value
        return change > self.min_delta

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The phase, where it began, and what its end depends on."""
        return {
            "phases": len(self.plan),
            "index": self.index,
            "start_step": self.start_step,
            "start_epoch": self.start_epoch,
            "length": self._length,
            "best": self._best,
            "bad": self._bad,
            "over": self._over,
            "weights": self._weights,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Enter the phase of the checkpoint: after the weights are loaded, before DDP wraps and the optimizer is made.

        Raises:
            CheckpointError: the run it comes from had another number of phases.
        """
        if self._task is None or self._held is not None:
            return
        if state_dict["phases"] != len(self.plan):
            raise CheckpointError(
                f"the checkpoint comes from a run with {state_dict['phases']} phases, methods.{self.name} has "
                f"{len(self.plan)}; resume with the run's own config, or start a new run from it with --init"
            )
        self.index, self.start_step = state_dict["index"], state_dict["start_step"]
        self.start_epoch, self._length = state_dict["start_epoch"], state_dict["length"]
        self._best, self._bad, self._over = state_dict["best"], state_dict["bad"], state_dict["over"]
        self._weights = state_dict["weights"]
        self._chosen = self.phase.apply(self._task)
        phase = self.phase
        schedule = self._phased(self._task)
        schedule.resume(self.start_step, self._length, phase.rates, phase.warmup, phase.lr)
        self._resumed = True
