"""``crossft average RUN ...``: blends of finished models, measured without training."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossft.backbones.batchnorm import reestimate_
from crossft.callbacks.monitoring import AtomicCheckpointIO
from crossft.cli.evaluate import prepared_like
from crossft.cli.leg import measure
from crossft.cli.results import primary_of
from crossft.cli.saved import Saved, open_run, take_option
from crossft.cli.screen import print_table
from crossft.cli.weights import checkpoint_of, load_weights
from crossft.data import DomainData
from crossft.data.passes import one_pass, training_rows
from crossft.errors import ConfigError
from crossft.functional.averaging import average, greedy_soup, interpolate
from crossft.runs import higher_is_better, write_atomic

__all__ = ["run"]

State = dict[str, Tensor]
ALPHAS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


@dataclass
class _Kitchen:
    """A model to put weights into, and the data to measure them on.

    Attributes:
        saved: the first run, opened.
        data: its data, with its splits.
        reestimate: role whose training rows BatchNorm statistics are computed on anew for each blend, or None.
    """

    saved: Saved
    data: DomainData
    reestimate: str | None

    def state_of(self, path: Path) -> State:
        """A checkpoint's weights, its heads found by label space; a head it lacks is the first run's."""
        load_weights(self.saved.task, self.saved.checkpoint)
        load_weights(self.saved.task, path)
        return {k: v.clone() for k, v in self.saved.task.state_dict().items()}

    def measured(self, state: State, split: str = "test", blend: bool = True) -> dict[str, float]:
        """Put the weights into the model and measure it; what the statistics became is written back to ``state``."""
        task = self.saved.task
        task.load_state_dict(state)
        if blend and self.reestimate is not None:
            self.data.bind(task.backbone.input_spec)
            rows = training_rows(self.data, self.reestimate)  # type: ignore[arg-type]
            reestimate_(task.backbone, (batch.inputs for batch in one_pass(self.data, rows)))
            state.update({k: v.clone() for k, v in task.state_dict().items()})
        return measure(self.saved.settings, task, self.data, split)


def run(command: str, arguments: list[str]) -> int:
    """Blend, measure, print; write a table with ``--output`` and the blend with ``--save``."""
    arguments, alphas = take_option(arguments, "alpha")
    arguments, greedy = take_option(arguments, "greedy")
    arguments, reestimate = take_option(arguments, "reestimate")
    arguments, output = take_option(arguments, "output")
    arguments, save = take_option(arguments, "save")
    named = arguments[: next((i for i, a in enumerate(arguments) if a.startswith("-")), None)]
    if reestimate not in (None, "source", "target"):
        raise ConfigError(f"--reestimate {reestimate}: allowed are source and target, whose training rows are read")
    saved = open_run(command, [*named[:1], *arguments[len(named) :]])
    kitchen = _Kitchen(saved, prepared_like(saved, keep_splits=True), reestimate)
    if len(named) == 1:
        rows, state = _line(kitchen, _numbers(alphas or ALPHAS))
    else:
        if alphas is not None:
            raise ConfigError("--alpha goes between one run and the run it started from; name one run")
        rows, state = _soup(kitchen, named, greedy)
    _show(kitchen, rows, output)
    if save is not None:
        checkpoint = AtomicCheckpointIO().load_checkpoint(saved.checkpoint)
        names = ("domains", "known_heads", "global_step", "epoch", "pytorch-lightning_version")
        kept = {k: checkpoint[k] for k in names if k in checkpoint}
        AtomicCheckpointIO().save_checkpoint({**kept, "state_dict": state, "terms": {}}, Path(save))
        print(f"saved {save}; use it with --init {save}")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--alpha {text!r} must be numbers divided by commas, as in 0,0.5,1") from None


def _line(kitchen: _Kitchen, alphas: Sequence[float]) -> tuple[list[tuple[str, dict[str, float]]], State]:
    """WiSE-FT: from the model the run started from to its own; the state is the last alpha's."""
    parent = kitchen.saved.folder.summary().get("parent")
    if not parent:
        raise ConfigError(
            f"{kitchen.saved.folder.path} started from no other run, so there is nothing to blend it with; "
            "name two or more runs for a soup"
        )
    start, end = kitchen.state_of(checkpoint_of(parent)), kitchen.state_of(kitchen.saved.checkpoint)
    rows, state = [], end
    for alpha in alphas:
        state = interpolate(start, end, alpha)
        rows.append((f"alpha {alpha:g}", kitchen.measured(state, blend=alpha not in (0.0, 1.0))))
    return rows, state


def _soup(
    kitchen: _Kitchen, runs: Sequence[str], metric: str | None
) -> tuple[list[tuple[str, dict[str, float]]], State]:
    """Each run, their uniform soup, and with a metric the greedy one; the state is the last of these."""
    states = [kitchen.state_of(checkpoint_of(path)) for path in runs]
    rows = [(Path(p).name, kitchen.measured(s, blend=False)) for p, s in zip(runs, states, strict=True)]
    soup = average(states)
    rows.append(("uniform soup", kitchen.measured(soup)))
    if metric is not None:
        sign = 1.0 if higher_is_better(metric) else -1.0

        def score(state: Any) -> float:
            found = kitchen.measured(dict(state), "val")
            if metric not in found:
                raise ConfigError(f"--greedy {metric} is not measured in validation; allowed: {', '.join(found)}")
            return sign * found[metric]

        soup, chosen = greedy_soup(states, score)
        rows.append((f"greedy soup of {len(chosen)}", kitchen.measured(soup)))
    return rows, soup


def _show(kitchen: _Kitchen, rows: Sequence[tuple[str, dict[str, float]]], output: str | None) -> None:
    keys = [f"{d}/test/{m}" for d, m in primary_of(kitchen.saved.task.domains).items()]
    keys = [k for k in keys if k in rows[0][1]]
    shown = [[name, *(f"{found[k]:.4f}" for k in keys)] for name, found in rows]
    print_table("blends, test splits", ["model", *(k.replace("/test/", " ") for k in keys)], shown)
    if output is not None:
        names = sorted({k for _, found in rows for k in found})
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["model", *names])
        writer.writerows([name, *(found.get(k, "") for k in names)] for name, found in rows)
        write_atomic(Path(output), text.getvalue())
