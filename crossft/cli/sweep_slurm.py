"""``crossft sweep slurm FILE``: submit a sweep to SLURM; imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crossft.errors import ConfigError, CrossftError
from crossft.sweeps.file import read_sweep
from crossft.sweeps.local import Outcome
from crossft.sweeps.plan import Plan, make_plan
from crossft.sweeps.slurm import Request, Submitted, submit
from crossft.sweeps.state import State, reason

__all__ = ["run"]

_DESCRIPTION = """Submit every arm and seed of a sweep file that is neither finished nor in the queue: one array job,
an element a run, after an array of the source legs. Called again, it submits what is left, and prints the comparison
of what there is. Flags of the config after the file, as in --data.root=DIR, hold for every run."""


def run(arguments: list[str]) -> int:
    """Submit what is left of a sweep and report on it; 1 where all has ended and a run failed."""
    options, flags = _options(arguments)
    sweep = read_sweep(options.file, flags)
    if sweep.method == "bayes":
        raise ConfigError(f"{sweep.path}: method: bayes chooses each trial by those before; use crossft sweep run")
    plan = make_plan(sweep, options.allow)
    more = dict(_pair(text) for text in options.sbatch)
    request = Request(options.partition, options.time, options.gpus, options.cpus, options.array_parallelism, more)
    done = submit(plan, request, options.retry)
    _print(plan, done)
    from crossft.cli.sweep import close, report

    if not (done.queued or done.submitted):
        report(plan)
        return close(_outcomes(plan, done))
    try:
        report(plan)
    except (CrossftError, OSError) as error:  # a run that begins, or goes on, writes its folder meanwhile
        print(f"no comparison now: {error}")
    return 0


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("crossft sweep slurm", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="the sweep file")
    parser.add_argument("--partition", help="partition (the cluster's default)")
    parser.add_argument("--time", help="time limit of a run, as in 4:00:00; a run that needs more is requeued")
    parser.add_argument("--gpus", type=int, help="GPUs on each node (trainer.devices, where the accelerator is gpu)")
    parser.add_argument("--cpus", type=int, default=1, help="cores and threads of each process (1)")
    parser.add_argument("--array-parallelism", type=int, metavar="N", help="at most N runs at a time")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="any option of sbatch")
    parser.add_argument("--retry", action="store_true", help="submit failed runs again")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="as for crossft fit")
    options, flags = parser.parse_known_args(arguments)
    for name, least in (("gpus", 0), ("cpus", 1), ("array_parallelism", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    return options, flags


def _pair(text: str) -> tuple[str, str | bool]:
    key, given, value = text.lstrip("-").partition("=")
    return key, value if given else True


def _print(plan: Plan, done: Submitted) -> None:
    counts = {state: sum(s is state for s in done.states.values()) for state in (State.FINISHED, State.FAILED)}
    print(
        f"{len(plan.runs)} runs: {counts[State.FINISHED]} finished, {counts[State.FAILED]} failed, "
        f"{len(done.queued)} in the queue, {len(done.submitted)} submitted"
    )
    if done.submitted:
        job = next(iter(done.submitted.values())).split("_")[0]
        after = f" after the source legs, job {done.sources}" if done.sources else ""
        print(f"submitted: job {job}{after}; logs: {plan.root / 'logs'}")
        print("crossft sweep plan says what is done; the same command submits what is left, and prints the comparison")


def _outcomes(plan: Plan, done: Submitted) -> list[Outcome]:
    found = [(r, done.states[r.folder.path]) for r in plan.runs]
    return [Outcome(r, state, "" if state.ended else reason(r.folder, r.log)) for r, state in found]
