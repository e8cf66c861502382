"""``crossft sweep plan FILE`` and ``crossft sweep run FILE``; imports no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossft.cli.agent import register, start
from crossft.cli.trials import clock, print_best, print_search
from crossft.errors import ConfigError
from crossft.runs import higher_is_better, write_atomic
from crossft.sweeps.file import read_sweep
from crossft.sweeps.local import Local, Outcome
from crossft.sweeps.plan import Cost, Plan, make_plan, measured_costs
from crossft.sweeps.progress import SweepProgress
from crossft.sweeps.search import Search, SearchPlan, make_search
from crossft.sweeps.state import State, state_of

if TYPE_CHECKING:
    from crossft.reports.tables import ArmTable

__all__ = ["close", "print_plan", "report", "run", "search"]

_DESCRIPTION = """Run every arm and seed of a sweep file. plan checks every config and prints what would run;
run does it, and goes on where it was stopped: finished runs are kept, unfinished ones resumed; slurm submits it to a
cluster (crossft sweep slurm --help).
wandb registers the sweep with W&B and prints the command of its agents, which start agent FILE ARGUMENTS for a run.
Flags of the config after the file, as in --data.root=DIR, hold for every run."""


def run(command: str, arguments: list[str]) -> int:
    """Plan, run or submit a sweep; 1 where a run failed or was stopped."""
    if arguments[:1] == ["slurm"]:
        from crossft.cli.sweep_slurm import run as run_slurm

        return run_slurm(arguments[1:])
    options, flags = _options(arguments)
    asked = flags.pop(0) if options.what == "agent" and flags else ""
    sweep = read_sweep(options.file, flags)
    if options.what == "wandb":
        return register(sweep, flags, options.allow)
    if options.what == "agent":
        return start(sweep, Path(asked), options.allow)
    if sweep.method == "bayes":
        return search(make_search(sweep, options.allow), options)
    plan = make_plan(sweep, options.allow)
    if options.what == "plan":
        print_plan(plan, options.slots, measured_costs(plan.runs) if options.measure else None)
        return 0
    local = Local(plan, options.slots, options.threads, _gpus(options), options.retry)
    done = sum(state_of(r.folder) is State.FINISHED for r in plan.runs)
    print(f"{len(plan.runs)} runs, {done} finished; {options.slots} at a time with {local.threads} threads each")
    with SweepProgress(len(plan.runs)) as progress:
        outcomes = local.run(progress)
    report(plan)
    return close(outcomes)


def search(plan: SearchPlan, options: argparse.Namespace) -> int:
    """Plan or run a search; 1 where a trial failed or was stopped."""
    if options.what == "plan":
        print_search(plan, options.slots, options.measure)
        return 0
    supply = Search(plan, options.retry)
    try:
        local = Local(
            Plan(plan.sweep, (), {}, plan.root),
            options.slots,
            options.threads,
            _gpus(options),
            options.retry,
            supply=supply,
        )
        left = supply.trials_left
        print(f"{left} trials are left; {options.slots} runs at a time with {local.threads} threads each")
        with SweepProgress(left * plan.runs_each) as progress:
            outcomes = local.run(progress)
    finally:
        supply.close()
    report(plan.plan())
    print_best(plan)
    return close(outcomes)


def _gpus(options: argparse.Namespace) -> list[int] | None:
    return [int(number) for number in options.gpus.split(",")] if options.gpus else None


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("crossft sweep", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("what", choices=("plan", "run", "wandb", "agent"))
    parser.add_argument("file", type=Path, help="the sweep file")
    parser.add_argument("--slots", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--threads", type=int, help="threads of each run (cores / slots)")
    parser.add_argument("--gpus", help="CUDA device numbers for the slots, as in 0,1,2")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--measure", action="store_true", help="plan: train a few steps of every arm to know the cost")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="as for crossft fit")
    options, flags = parser.parse_known_args(arguments)
    if options.slots < 1:
        raise ConfigError(f"--slots={options.slots} must be at least 1")
    if options.gpus and not all(number.strip().isdigit() for number in options.gpus.split(",")):
        raise ConfigError(f"--gpus={options.gpus} must be device numbers, as in 0,1,2")
    return options, flags


def print_plan(plan: Plan, slots: int, measured: Mapping[str, Cost] | None = None) -> None:
    """Print the arms with their differences and states, the number of runs and source legs, and what is left to do.

    ``measured`` is what a run of each arm is expected to cost, where that was measured.
    """
    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for name in ("arm", "runs", f"difference to {plan.base}"):
        table.add_column(name, overflow="fold")
    for label, lines in plan.differences.items():
        states = [state_of(r.folder).value for r in plan.runs if r.arm.label == label]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        shown = ", ".join(f"{n} {'to start' if state == 'missing' else state}" for state, n in counts.items())
        table.add_row(Text(label), shown, Text("\n".join(lines) or "none"))
    console.print(table)
    arms, seeds = len(plan.differences), len(plan.sweep.seeds)
    console.print(f"{arms} arms x {seeds} seeds = {len(plan.runs)} runs in {plan.root}", markup=False)
    sources = plan.sources()
    if sources:
        console.print(f"{len(sources)} source legs are fitted once each, for {sum(sources.values())} runs")
    seconds = plan.seconds_left(measured)
    cost = "unknown until a run has finished, or --measure" if seconds is None else f"{clock(seconds)} of runs"
    at_a_time = f", about {clock(seconds / slots)} with {slots} at a time" if seconds and slots > 1 else ""
    console.print(f"left to do: {cost}{at_a_time}")


def report(plan: Plan) -> None:
    """Print the comparison of the sweep's runs; write it, its pictures and its page beside the run folders."""
    from crossft.reports.figures import tradeoff
    from crossft.reports.overall import overall
    from crossft.reports.page import write_page
    from crossft.reports.records import groups, headline, leaves, read_records, with_baseline
    from crossft.reports.tables import compare, counted, text_of

    paths = [r.folder.path for r in plan.runs if r.folder.summary_file.is_file()]
    if not paths:
        return
    records = read_records(paths)
    baseline = plan.baseline if plan.baseline in set(records["arm"]) else None
    columns, metric = headline(records), plan.sweep.metric
    if metric in records.columns and metric not in columns:
        columns.append(str(metric))
    tables = [*compare(records, baseline, columns or None), *overall(records, baseline, columns or None)]
    for table in tables:
        Console(highlight=False).print(table.rich())
        if plan.sweep.method != "bayes":
            _print_best(table, metric)
    write_atomic(plan.root / "comparison.md", text_of(tables, "markdown"))
    write_atomic(plan.root / "comparison.csv", text_of(tables, "csv"))
    drawn = [(title, runs) for title, runs in groups(leaves(records)) if (runs["status"] == "finished").any()]
    for number, (title, runs) in enumerate(drawn, 1):
        filled = with_baseline(counted(runs), baseline) if baseline else counted(runs)
        tradeoff(filled, plan.root / f"tradeoff{f'-{number}' if len(drawn) > 1 else ''}.png", title=title)
    page = write_page(paths, plan.root / "comparison.html", baseline=baseline, metrics=columns or None)
    print(f"written: {page} (and .md, .csv, tradeoff.png beside it)")


def _print_best(table: ArmTable, metric: str | None) -> None:
    """Say which mean is the best, among arms that have as many seeds as any; that it is significant is not said."""
    if metric is None or metric not in table.metrics:
        return
    values = {arm: table.cells[arm, metric].value for arm in table.runs}
    seeds = max(value.n for value in values.values())
    known = {arm: value.mean for arm, value in values.items() if value.n == seeds and not math.isnan(value.mean)}
    if known:
        best = (max if higher_is_better(metric) else min)(known, key=known.__getitem__)
        print(f"best mean of {metric}, without a test: {best} ({known[best]:.4f})")


def close(outcomes: Sequence[Outcome]) -> int:
    """Say which runs are not finished, and why; return the exit code."""
    wrong = [o for o in outcomes if not o.state.ended]
    for outcome in wrong:
        word = "failed" if outcome.state is State.FAILED else "stopped"
        print(f"{word}: {outcome.run.name}: {outcome.reason}\n  log: {outcome.run.log}")
    if any(o.state is State.FAILED for o in wrong):
        print("failed runs are not tried again unless --retry is given")
    if any(o.state is State.UNFINISHED for o in wrong):
        print("the same command goes on with the stopped runs")
    return 1 if wrong else 0
