"""``python -m crossft.cli.cost``: how long runs would take, from a few steps of each; ``crossft sweep plan --measure``.

Reads ``{"lines": [[flags of crossft fit]], "allow": [packages]}`` from standard input and writes a list of one object a
line: ``{"error": text}``, or the expected ``seconds`` of the run and ``source_seconds`` of its source leg, 0 without
one. No run folder is made; methods, data and evaluation are those of the run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from crossft.callbacks.freezing import GradualUnfreezing
from crossft.cli.ahead import planned_course
from crossft.cli.leg import build_methods, build_task, build_trainer, measure
from crossft.cli.legs import Chain, prepared
from crossft.cli.parser import Settings
from crossft.data import DomainData
from crossft.errors import ConfigError, CrossftError

__all__ = ["main", "seconds_of"]

_STEPS = 8
"""Optimizer steps that are timed; the first two are not counted."""


class _Clock(Callback):
    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times.append((trainer.global_step, time.monotonic()))


def seconds_of(settings: Settings, data: DomainData, before: bool) -> float:
    """Expected seconds of one leg: what comes before the first step, all its steps, validations and tests.

    Steps are taken to cost what the first ones do: phases that unfreeze later, and caches that fill, are not foreseen.

    Args:
        settings: the leg's configuration.
        data: its data, prepared.
        before: whether the starting model is tested.
    """
    config = settings.config
    seed_everything(config.seed_everything, workers=True, verbose=False)
    began = time.monotonic()
    task = build_task(settings, data)
    clock, quiet = _Clock(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [*build_methods(settings), clock]
    for method in callbacks:
        if isinstance(method, GradualUnfreezing):
            method.whole = False
    limits = {"max_steps": _STEPS, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = build_trainer(settings, callbacks=callbacks, **limits, **quiet)
    trainer.fit(task, datamodule=data)
    ends = list(dict(clock.times).values())
    each = statistics.median(b - a for a, b in pairwise(ends[1:])) if len(ends) > 2 else ends[-1] - began
    start = max(0.0, ends[0] - began - each)
    batches = data.steps_per_epoch * int(config.trainer.accumulate_grad_batches)
    course = planned_course(config.trainer, batches, bool(data.eval_domains("val")))
    if course is None:
        raise ConfigError("trainer.max_epochs and trainer.max_steps set no end; a cost needs one")
    took = {}
    for split in ("val", "test"):
        since = time.monotonic()
        if data.eval_domains("val" if split == "val" else "test"):
            measure(settings, task, data, split)
        took[split] = time.monotonic() - since
    validations = course.validations(course.total) + 1  # and the one before the first step
    found: float = start + each * course.total + took["val"] * validations + took["test"] * (1 + before)
    return found


def _cost(line: list[str], allow: list[str]) -> dict[str, Any]:
    try:
        chain = Chain(Settings(line, "sweep", allow))
        source = prepared(chain.source) if chain.source is not None else None
        data = prepared(chain.settings, source.split_manifest() if source is not None else None)
        legs = 0.0 if source is None or chain.source is None else seconds_of(chain.source, source, False)
        return {"seconds": seconds_of(chain.settings, data, chain.settings.config.before), "source_seconds": legs}
    except CrossftError as error:
        return {"error": str(error)}


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        found = [_cost(line, asked["allow"]) for line in asked["lines"]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
