"""``crossft inspect --config FILE``: what of the model trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from crossft.callbacks.freezing import Freeze
from crossft.cli.parser import Settings
from crossft.cli.screen import print_table
from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Domain

__all__ = ["run", "stage_rows"]


def run(command: str, arguments: list[str]) -> int:
    """Print one row a stage."""
    settings = Settings(["--data.root=.", *arguments], "inspect")
    task = _task(settings)
    for method in dict(settings.build("methods").methods or {}).values():
        if isinstance(method, Freeze):
            method.setup(None, task, "fit")  # type: ignore[arg-type]  # it reads the task alone
    rows = stage_rows(task)
    print_table(type(task.backbone).__name__, ["stage", "parameters", "trainable", "buffers"], rows)
    print(f"batchnorm: {task.batchnorm}; a head is added for every label space")
    return 0


def stage_rows(task: Task) -> list[list[str]]:
    """Stage, parameters, trainable parameters and buffer entries, and their sum."""
    rows: list[tuple[str, int, int, int]] = []
    for stage in task.backbone.stages:
        parameters = stage.parameters()
        buffers = [b for module in stage.modules for b in module.buffers()]
        trainable = [p for p in parameters if p.requires_grad]
        rows.append((stage.name, _count(parameters), _count(trainable), sum(b.numel() for b in buffers)))
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows)))
    return [[name, f"{parameters:,}", f"{trains:,}", f"{held:,}"] for name, parameters, trains, held in rows]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _task(settings: Settings) -> Task:
    """The config's task over a stand-in domain of a kind it takes: the data is not read."""
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
