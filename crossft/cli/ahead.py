"""A run before it runs: its model with its terms, its data, and how many steps it takes; nothing is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.freezing.course import Course, check_lengths, check_reach, earliest_starts
from crossft.cli.leg import build_methods, build_task
from crossft.cli.parser import Settings
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Domain

__all__ = ["Ahead", "look_ahead", "planned_course", "settings_of"]

_NO_ROOT = "--data.root=/dev/null"  # no folder anywhere


@dataclass(frozen=True)
class Ahead:
    """What is known of a run.

    Attributes:
        task: with the methods' terms attached, where the data is known.
        plan: its phases; empty where it has none.
        course: its steps and validations; None where they are not known.
        starts: earliest first step of each phase that is entered; empty where the course is not known.
        stand_in: whether the task's domain is a stand-in of two classes, as the data was not read.
        left_out: methods whose terms are not attached.
    """

    task: Task
    plan: list[Phase]
    course: Course | None
    starts: list[int]
    stand_in: bool
    left_out: list[str]


def settings_of(arguments: list[str]) -> Settings:
    """The settings of ``inspect``, where ``data.root`` may be left out."""
    try:
        return Settings(arguments, "inspect")
    except ConfigError:
        return Settings([_NO_ROOT, *arguments], "inspect")


def look_ahead(settings: Settings, steps: int | None = None) -> Ahead:
    """Build what a run would train.

    The data is read (labels and splits, without a look into images) where ``data.root`` is a folder and a domain is
    named. Phases and terms are set up as the fit would.

    Args:
        settings: the run's; its domains are set.
        steps: optimizer steps of the run, where the config does not say.

    Raises:
        ConfigError: the run cannot work as far as it is known here; its last phase is never entered, for one.
    """
    data = _data(settings)
    task = _stand_in(settings) if data is None else build_task(settings, data)
    methods = build_methods(settings)
    terms = [m for m in methods if isinstance(m, MethodCallback)]
    trainer = _trainer(settings, data, methods)
    task.trainer = trainer
    for method in methods:
        if isinstance(method, Freeze | GradualUnfreezing) or (data is not None and method in terms):
            method.setup(trainer, task, "fit")
    task.setup("fit")
    course = _guessed(settings, steps) if data is None else _course(settings, data, trainer, steps)
    plan: list[Phase] = []
    for method in methods:
        if isinstance(method, GradualUnfreezing):
            plan = method.plan
            if data is not None and course is not None:
                check_reach(plan, course, method.name)
            else:
                check_lengths(plan, settings.config.trainer.max_epochs, settings.config.trainer.max_steps, method.name)
    starts = earliest_starts(plan, course) if course is not None else []
    left_out = [m.name for m in terms] if data is None else []
    return Ahead(task, plan, course, starts, data is None, left_out)


def _data(settings: Settings) -> DomainData | None:
    given = settings.config.data
    named = any(given.get(role) for role in ("source", "target", "eval"))
    if not named or not Path(given.root).is_dir():
        return None
    given.verify = "off"
    data: DomainData = settings.build("data").data
    data.prepare()
    return data


def _stand_in(settings: Settings) -> Task:
    """The config's task over one stand-in domain of a kind it takes."""
    stand_ins = [Domain("data", "target", "multiclass", ("a", "b")), Domain("data", "target", "regression", ("y",))]
    for domain in stand_ins:
        settings.set_domains([domain])
        try:
            task: Task = settings.build("model").model
            return task
        except ConfigError:
            if domain is stand_ins[-1]:
                raise
    raise AssertionError("unreachable")


def _trainer(settings: Settings, data: DomainData | None, methods: list[Callback]) -> Any:
    """What setting up reads of a Trainer; none is built, so a config for other hardware is looked at anywhere."""
    given = settings.config.trainer
    return SimpleNamespace(
        datamodule=data,
        callbacks=methods,
        strategy=None,
        world_size=_processes(given),
        global_rank=0,
        global_step=0,
        is_global_zero=True,
        accumulate_grad_batches=given.accumulate_grad_batches,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=given.use_distributed_sampler),
    )


def _processes(trainer: Any) -> int:
    devices, nodes = trainer.devices, int(trainer.num_nodes or 1)
    if isinstance(devices, (list, tuple)):
        return len(devices) * nodes
    if str(devices).isdigit():
        return int(devices) * nodes
    gpus = torch.cuda.device_count() if str(trainer.accelerator) in ("auto", "gpu", "cuda") else 1
    return max(1, gpus) * nodes


def _course(settings: Settings, data: DomainData, trainer: Any, steps: int | None) -> Course | None:
    data.trainer = trainer
    batches = data.steps_per_epoch * int(trainer.accumulate_grad_batches)
    return planned_course(settings.config.trainer, batches, bool(data.eval_domains("val")), steps)


def planned_course(given: Any, batches: int, validates: bool, steps: int | None = None) -> Course | None:
    """The course that a Trainer would compute.

    Args:
        given: its settings.
        batches: micro-batches of an epoch, as the data makes them.
        validates: whether the data has rows to validate on.
        steps: optimizer steps, where they are not to come from the settings.

    Returns:
        None where nothing says how many steps there are.
    """
    accumulation = int(given.accumulate_grad_batches)
    batches = _limited(batches, given.limit_train_batches)
    epochs, most = int(given.max_epochs or -1), int(given.max_steps or -1)
    known = [n for n in (epochs * math.ceil(batches / accumulation), most) if n > 0]
    if not known and steps is None:
        return None
    every, interval = 1, given.val_check_interval  # a time: taken to be after every micro-batch
    if isinstance(interval, int) and not isinstance(interval, bool):
        every = interval
    elif interval is None or isinstance(interval, float):
        every = max(1, int(batches * (1.0 if interval is None else interval)))
    every = every if validates and given.limit_val_batches != 0 else 0
    return Course(steps or min(known), batches, accumulation, every, given.check_val_every_n_epoch)


def _limited(batches: int, limit: float | None) -> int:
    if limit is None:
        return batches
    return max(1, min(batches, limit if isinstance(limit, int) else int(batches * limit)))


def _guessed(settings: Settings, steps: int | None) -> Course | None:
    """Without the data: the steps that are named, in ``trainer.max_epochs`` epochs of one validation each."""
    given = settings.config.trainer
    total = steps or max(0, int(given.max_steps or 0))
    return Course(total, math.ceil(total / max(1, int(given.max_epochs or 1)))) if total else None
