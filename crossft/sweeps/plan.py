"""The plan of a sweep: every run with its folder, its config checked, and what it is expected to cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossft.errors import ConfigError, RunError
from crossft.runs import RunFolder, run_id
from crossft.runs.files import plain
from crossft.sweeps.arms import Arm, arguments, expand
from crossft.sweeps.file import SweepFile
from crossft.sweeps.state import State, state_of

__all__ = [
    "Cost",
    "Plan",
    "Run",
    "difference",
    "make_plan",
    "measured_costs",
    "one_run",
    "refuse_metric",
    "resolved",
    "source_seed",
]

NAMED = ("arm", "experiment", "seed_everything", "run")
"""Keys by which the runs of one arm differ."""


@dataclass(frozen=True)
class Run:
    """One run of the sweep.

    Attributes:
        arm: its arm.
        seed: its seed.
        folder: where it lies, computed: ``ROOT/EXPERIMENT/ARM-sSEED-HASH`` with a hash over the resolved config.
        source: a name that runs share whose source leg is the same; None where there is no such leg.
        flags: the arguments after ``crossft fit``.
        allow: the ``--allow`` flags, which a resume needs as well.
        trainer: the ``trainer`` section of its resolved config.
    """

    arm: Arm
    seed: int
    folder: RunFolder
    source: str | None
    flags: tuple[str, ...]
    allow: tuple[str, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called on the screen: arm, domains where they vary, seed."""
        return f"{self.arm.label} s{self.seed}"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder.path.parent / "logs" / f"{self.folder.path.name}.log"


@dataclass(frozen=True)
class Cost:
    """Expected seconds of a run, and of the source leg that it starts from."""

    run: float
    source: float


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Attributes:
        sweep: the file.
        runs: every run, seeds of an arm together.
        differences: for each arm's label, what its resolved config has that the base has not, as ``key=value``.
        base: what that is: the base config with the fixed values, or the first arm where that alone is no config.
        root: the experiment's folder, which holds the run folders.
    """

    sweep: SweepFile
    runs: tuple[Run, ...]
    differences: Mapping[str, tuple[str, ...]]
    root: Path
    base: str = "the base"

    @property
    def baseline(self) -> str | None:
        """The arm that others are compared with: as the file says, else the arm with all methods, or with none."""
        made = "all" if self.sweep.leave_one_out else "none" if self.sweep.add_one_in else None
        names = {run.arm.name for run in self.runs}
        return self.sweep.baseline or (made if made in names else None)

    def sources(self) -> dict[str, int]:
        """The source legs, each with the number of runs that start from it."""
        found: dict[str, int] = {}
        for run in self.runs:
            if run.source is not None:
                found[run.source] = found.get(run.source, 0) + 1
        return found

    def seconds_left(self, measured: Mapping[str, Cost] | None = None) -> float | None:
        """Expected time of all unfinished runs, from finished siblings; None where none has finished or was measured.

        A run costs the median of its arm's finished runs, else what was measured, else the median of all; a source leg
        the median of finished source legs. What an unfinished run has already done is not taken off.

        Args:
            measured: what a run of each arm is expected to cost, by the arm's label.
        """
        measured = measured or {}
        took: dict[str, list[float]] = {}
        legs: dict[Path, float] = {}
        left: list[Run] = []
        for run in self.runs:
            if state_of(run.folder) is not State.FINISHED:
                left.append(run)
                continue
            summary = run.folder.summary()
            took.setdefault(run.arm.label, []).append(float(summary["seconds"] or 0.0))
            parent = RunFolder(str(summary["parent"]))
            if run.source is not None and state_of(parent) is State.FINISHED:
                legs[parent.path] = float(parent.summary()["seconds"] or 0.0)
        if not took and not measured:
            return None
        known = [value for values in took.values() for value in values] or [c.run for c in measured.values()]
        usual = statistics.median(known)
        expected = {label: cost.run for label, cost in measured.items()}
        expected |= {label: statistics.median(values) for label, values in took.items()}
        seconds = sum(expected.get(run.arm.label, usual) for run in left)
        done = {run.source for run in self.runs if run not in left}
        missing = {run.source for run in left} - done - {None}
        each = [*legs.values()] or [cost.source for cost in measured.values()]
        return seconds + len(missing) * (statistics.median(each) if each else 0.0)


def make_plan(sweep: SweepFile, allow: Sequence[str] = (), program: Sequence[str] | None = None) -> Plan:
    """Expand the file and check the config of every arm, in one child process that imports the command line.

    Args:
        sweep: the file.
        allow: packages from ``--allow``.
        program: what resolves the configs; by default ``python -m crossft.cli.resolve``.

    Raises:
        ConfigError: an arm's config is refused, by the arm's name; or two arms are the same run.
        RunError: the child process failed.
    """
    arms = expand(sweep)
    config = f"--config={sweep.config}"
    common = [config, f"--experiment={sweep.experiment}"]
    lines = [[*common, *arguments(sweep.fixed)]]
    lines += [[*common, *arguments(arm.overrides), f"--arm={arm.name}"] for arm in arms]
    base, *found = resolved(lines, allow, program)
    _refuse(sweep, arms, found)
    refuse_metric(sweep, found)
    root = Path(found[0]["config"]["run"]["root"]) / sweep.experiment
    allowed = tuple(f"--allow={package}" for package in allow)
    runs = []
    for arm, line, one in zip(arms, lines[1:], found):
        runs += [_run(arm, seed, root, line, one, allowed) for seed in sweep.seeds]
    reference = base.get("config") or found[0]["config"]
    named = "the base" if "config" in base else arms[0].label
    differences = {arm.label: difference(reference, one["config"]) for arm, one in zip(arms, found)}
    return Plan(sweep, tuple(runs), differences, root, named)


def _run(arm: Arm, seed: int, root: Path, line: Sequence[str], one: Mapping[str, Any], allowed: tuple[str, ...]) -> Run:
    folder = RunFolder(root / run_id(arm.name, seed, one["hash"]))
    source = None if one["source"] is None else f"{one['source']}-s{source_seed(one, seed)}"
    flags = (*line, f"--seed_everything={seed}", f"--run.dir={folder.path}", *allowed)
    return Run(arm, seed, folder, source, flags, allowed, one["config"].get("trainer") or {})


def one_run(
    sweep: SweepFile, arm: Arm, seed: int, allow: Sequence[str] = (), program: Sequence[str] | None = None
) -> Run:
    """One run of a sweep, its config checked: the same as the plan's, where that has this arm and seed.

    Raises:
        ConfigError: its config is refused.
        RunError: the child process failed.
    """
    line = [f"--config={sweep.config}", f"--experiment={sweep.experiment}"]
    line += [*arguments(arm.overrides), f"--arm={arm.name}"]
    found = resolved([line], allow, program)
    _refuse(sweep, [arm], found)
    root = Path(found[0]["config"]["run"]["root"]) / sweep.experiment
    return _run(arm, seed, root, line, found[0], tuple(f"--allow={package}" for package in allow))


def source_seed(one: Mapping[str, Any], seed: int) -> int:
    """The seed of a run's source leg: its own where that is fixed, else the run's."""
    fixed = one["source_seed"]
    return seed if fixed is None else int(fixed)


def measured_costs(runs: Sequence[Run], program: Sequence[str] | None = None) -> dict[str, Cost]:
    """Train a few steps of one run of each arm, in one child process, and say what a run of each arm costs.

    Returns:
        The cost by the arm's label.

    Raises:
        RunError: the child process failed, or a run was refused.
    """
    first = {run.arm.label: run for run in reversed(runs)}
    allow = [flag.removeprefix("--allow=") for flag in runs[0].allow]
    words = program or [sys.executable, "-m", "crossft.cli.cost"]
    found = dict(zip(first, resolved([[*run.flags] for run in first.values()], allow, words)))
    for label, one in found.items():
        if "error" in one:
            raise RunError(f"the cost of arm {label} could not be measured: {one['error']}")
    return {label: Cost(one["seconds"], one["source_seconds"]) for label, one in found.items()}


def resolved(
    lines: list[list[str]], allow: Sequence[str] = (), program: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """What ``crossft.cli.resolve`` says to these command lines.

    Raises:
        RunError: the child process failed.
    """
    asked = json.dumps({"lines": lines, "allow": [*allow]})
    words = [*(program or [sys.executable, "-m", "crossft.cli.resolve"])]
    environment = dict(os.environ)
    if program is None:  # it trains nothing: no hub is asked, and a job that plans is not the one that will run
        environment = {k: v for k, v in environment.items() if not k.startswith("SLURM_")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RunError(f"the configs could not be checked: {' '.join(done.stderr.split()[-60:])}")
    return list(json.loads(done.stdout))


def _refuse(sweep: SweepFile, arms: Sequence[Arm], found: Sequence[Mapping[str, Any]]) -> None:
    wrong = [f"arm {arm.label}: {one['error']}" for arm, one in zip(arms, found) if one.get("error")]
    if wrong:
        raise ConfigError("\n".join([f"{sweep.path}: {len(wrong)} of {len(arms)} arms are refused", *wrong]))
    seen: dict[str, Arm] = {}
    for arm, one in zip(arms, found):
        text = json.dumps(_without_names(one["config"]), sort_keys=True, default=str)
        if text in seen:
            raise ConfigError(
                f"{sweep.path}: arms {seen[text].label} and {arm.label} are the same run; remove one, or check "
                "whether an override says what the base says anyway"
            )
        seen[text] = arm


def refuse_metric(sweep: SweepFile, found: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a metric of the file that none of its runs measures, as far as their metrics are known.

    Raises:
        ConfigError: ``metric`` is of the form ``DOMAIN/val/METRIC`` or ``DOMAIN/test/METRIC``, and no run has it.
    """
    metric, parts = sweep.metric, (sweep.metric or "").split("/")
    lists = [one.get("metrics") for one in found]
    if metric is None or len(parts) != 3 or parts[1] not in ("val", "test"):
        return
    known = dict.fromkeys(name for names in lists for name in names or ())
    if all(names is not None for names in lists) and metric not in known:
        allowed = ", ".join(name for name in known if f"/{parts[1]}/" in name)
        raise ConfigError(
            f"{sweep.path}: metric.name={metric!r} is measured by no arm; allowed: {allowed or 'nothing'}"
        )


def difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs between two resolved configs, as ``key=value``; names of the runs are left out.

    An object of another class is shown whole: ``methods.l2sp=L2SP(weight=0.1)``.
    """
    return tuple(_difference(_without_names(base), _without_names(other), ""))


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NAMED}


def _difference(base: Any, other: Any, key: str) -> list[str]:
    if base == other:
        return []
    both = isinstance(base, Mapping) and isinstance(other, Mapping)
    if not both or base.get("class_path") != other.get("class_path"):
        return [f"{key}={_shown(other)}"]
    lines: list[str] = []
    for name in dict.fromkeys([*base, *other]):
        place = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        lines += _difference(base.get(name), other.get(name), place)
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        given = value.get("init_args") or {}
        words = ", ".join(f"{name}={_shown(inner)}" for name, inner in given.items())
        return f"{str(value['class_path']).rpartition('.')[2]}({words})"
    return value if isinstance(value, str) else json.dumps(plain(value), default=str)
