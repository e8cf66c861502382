"""What ``crossft sweep`` prints of a search: its spaces before, its trials after."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossft.runs import higher_is_better
from crossft.sweeps.parameters import Parameter, as_text
from crossft.sweeps.search import SearchPlan

__all__ = ["clock", "print_best", "print_search"]


def clock(seconds: float) -> str:
    """Seconds in words: ``1 h 5 min``."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def print_search(plan: SearchPlan, slots: int, measure: bool = False) -> None:
    """Print what each arm searches, the number of trials, and what is left to do.

    ``measure`` trains a few steps of every arm, to know the cost before a run has finished.
    """
    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for name in ("arm", "trials", "searched"):
        table.add_column(name, overflow="fold")
    left = 0
    for space in plan.spaces:
        study = plan.study(space) if plan.file.is_file() else None
        trials = study.trials() if study else []
        left += plan.sweep.run_cap - (study.asked if study else 0) + sum(t.state.name == "RUNNING" for t in trials)
        states = [t.state.name.lower() for t in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        shown = "\n".join(_described(p) for p in space.parameters)
        table.add_row(Text(space.arm), f"{plan.sweep.run_cap}" + (f": {counts}" if counts else ""), Text(shown))
    console.print(table)
    seeds, places = len(plan.sweep.seeds), len(plan.spaces[0].places)
    tasks = f" x {places} tasks" if places > 1 else ""
    console.print(
        f"{len(plan.spaces)} arms x {plan.sweep.run_cap} trials x {seeds} seeds{tasks}, in {plan.root}", markup=False
    )
    oracle = " (it reads test labels: an oracle)" if plan.sweep.oracle else ""
    console.print(f"searched for: {plan.sweep.metric}, mean over the runs of a trial{oracle}", markup=False)
    seconds = plan.seconds_left(left, measure)
    cost = "unknown until a run has finished, or --measure" if seconds is None else f"at most {clock(seconds)} of runs"
    at_a_time = f", about {clock(seconds / slots)} with {slots} at a time" if seconds and slots > 1 else ""
    console.print(f"left to do: {left} trials, {cost}{at_a_time}")


def _described(parameter: Parameter) -> str:
    if parameter.values:
        said = ", ".join(map(as_text, parameter.values))
    else:
        said = parameter.distribution + "".join(f" {word}={value:g}" for word, value in parameter.settings.items())
    when = "".join(f", where {key} is {' or '.join(values)}" for key, values in parameter.when.items())
    return f"{parameter.key}: {said}{when}"


def print_best(plan: SearchPlan) -> None:
    """Print, for each arm, how its trials ended and which is the best."""
    up = higher_is_better(str(plan.sweep.metric))
    for space in plan.spaces:
        study = plan.study(space)
        trials = study.trials()
        states = [t.state.name.lower() for t in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        told: list[Any] = [t for t in trials if t.state.name == "COMPLETE"]
        print(f"{space.arm}: {len(trials)} trials: {counts}")
        if told:
            best = (max if up else min)(told, key=lambda t: t.value)
            (name,) = {run.arm.name for run in plan.runs(space, plan.known(space, best))}
            note = ", chosen by test labels: an oracle" if plan.sweep.oracle else ""
            print(f"best {plan.sweep.metric} of {space.arm}: {name} ({best.value:.4f}{note})")
