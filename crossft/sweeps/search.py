"""A search: the trials of every arm, as ordinary runs that Optuna chooses one after the other."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crossft.errors import ConfigError, RunError
from crossft.runs import RunFolder, config_hash, higher_is_better, run_id
from crossft.sweeps.arms import DOMAINS, Arm, applies, arguments, arm_of, named_arms, parameters_of, placed
from crossft.sweeps.file import SweepFile
from crossft.sweeps.local import Outcome
from crossft.sweeps.parameters import Parameter
from crossft.sweeps.plan import Plan, Run, measured_costs, refuse_metric, resolved, source_seed
from crossft.sweeps.state import State, state_of
from crossft.sweeps.study import TrialStudy, check_optuna

__all__ = ["Search", "SearchPlan", "Space", "make_search"]


@dataclass(frozen=True)
class Space:
    """What one arm searches.

    Attributes:
        arm: the arm's name.
        overrides: the arm's own overrides.
        parameters: what is drawn, in order.
        places: the domains of each task, by their config keys; one empty mapping where the sweep varies none.
        hashes: for each place, the hash of the arm's resolved config, without drawn values.
        sources: for each place, the source leg that all its trials share, with the seed where it is fixed; else None.
    """

    arm: str
    overrides: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    places: tuple[Mapping[str, Any], ...]
    hashes: tuple[str, ...]
    sources: tuple[Mapping[str, Any] | None, ...]


@dataclass(frozen=True)
class SearchPlan:
    """A search, its configs checked.

    Attributes:
        sweep: the file.
        spaces: one for each arm.
        root: the experiment's folder.
        allow: the ``--allow`` flags of every run.
    """

    sweep: SweepFile
    spaces: tuple[Space, ...]
    root: Path
    allow: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Optuna's storage."""
        return self.root / "search.db"

    @property
    def runs_each(self) -> int:
        """Number of runs of one trial, where none of them fails."""
        return len(self.sweep.seeds) * len(self.spaces[0].places)

    def study(self, space: Space) -> TrialStudy:
        """The study of one arm; made where it is missing."""
        sweep, name = self.sweep, self._study_name(space)
        return TrialStudy(self.file, name, higher_is_better(str(sweep.metric)), sweep.run_cap, sweep.early_terminate)

    def _study_name(self, space: Space) -> str:
        sweep = self.sweep
        early = None if sweep.early_terminate is None else asdict(sweep.early_terminate)
        parts = [repr(p) for p in space.parameters], space.hashes, sweep.seeds, sweep.metric, early
        return f"{space.arm}-{config_hash({'study': json.loads(json.dumps(parts))})[:8]}"

    def values(self, space: Space, trial: Any) -> dict[str, Any]:
        """Draw a trial's parameters, those that apply; or read them where they were drawn before."""
        values: dict[str, Any] = {}
        for parameter in space.parameters:
            if applies(self.sweep, parameter, {**self.sweep.fixed, **space.overrides, **values}):
                values[parameter.key] = TrialStudy.value_of(parameter, trial)
        return values

    def known(self, space: Space, frozen: Any) -> dict[str, Any]:
        """The values of a trial that was drawn."""
        return self.values(space, _Drawn(frozen.params))

    def runs(self, space: Space, values: Mapping[str, Any], number: int = 0) -> list[Run]:
        """The runs of one trial: its seeds, over all places. The first reports to the study while it trains.

        A run measures the metric, so studies share runs only by the same one; and none where trials end early, as a run
        that is worse than the others of one study says nothing in another.
        """
        study = self._study_name(space)
        owner = {"metric": self.sweep.metric} if self.sweep.early_terminate is None else {"study": study}
        arms = placed([arm_of(self.sweep, space.arm, space.overrides, {**values, **p}) for p in space.places])
        found: list[Run] = []
        for index, seed in itertools.product(range(len(arms)), self.sweep.seeds):
            digest = config_hash({"config": space.hashes[index], "values": dict(values), **owner})
            folder = RunFolder(self.root / run_id(arms[index].name, seed, digest))
            source = space.sources[index]
            shared = None if source is None else f"{source['source']}-s{source_seed(source, seed)}"
            trial = [f"--trial.metric={self.sweep.metric}"] + (self._reports(study, number) if not found else [])
            flags = [*_line(self.sweep, arms[index]), f"--seed_everything={seed}", f"--run.dir={folder.path}", *trial]
            found.append(Run(arms[index], seed, folder, shared, (*flags, *self.allow), self.allow))
        return found

    def _reports(self, study: str, number: int) -> list[str]:
        early = self.sweep.early_terminate
        if early is None:
            return []
        where = {"storage": self.file.absolute(), "study": study, "number": number}
        return [f"--trial.{k}={v}" for k, v in where.items()] + [f"--trial.early_terminate={json.dumps(asdict(early))}"]

    def plan(self) -> Plan:
        """Every run of every trial so far, for the report."""
        runs: dict[Path, Run] = {}
        for space in self.spaces if self.file.is_file() else ():
            study = self.study(space)
            for trial in study.trials():
                if trial.state.name != "WAITING":
                    runs |= {r.folder.path: r for r in self.runs(space, self.known(space, trial))}
        return Plan(self.sweep, tuple(r for r in runs.values() if r.folder.summary_file.is_file()), {}, self.root)

    def seconds_left(self, left: int, measure: bool = False) -> float | None:
        """Expected time of ``left`` trials, from the median of the finished runs; None where that is unknown.

        ``measure`` trains a few steps of every arm instead; source legs are not counted.
        """
        if measure:
            lowest = [self.runs(space, next(_ends(self.sweep, space.arm)))[0] for space in self.spaces]
            done = [cost.run for cost in measured_costs(lowest).values()]
        else:
            done = [r.folder.summary()["seconds"] for r in self.plan().runs if state_of(r.folder) is State.FINISHED]
        return statistics.median(done) * left * self.runs_each if done else None


class _Drawn:
    """A trial whose values are known, for those who ask like Optuna."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._params.get(name, choices[0])  # a search that was killed while it drew

    def suggest_int(self, name: str, low: int, high: int) -> Any:
        return self._params.get(name, low)

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> Any:
        return self._params.get(name, low)


def make_search(sweep: SweepFile, allow: Sequence[str] = (), program: Sequence[str] | None = None) -> SearchPlan:
    """Check the config of every arm with the ends and values of its parameters, in one child process.

    Raises:
        ConfigError: an arm's config is refused, or Optuna is not installed.
        RunError: the child process failed.
    """
    check_optuna()
    places = _places(sweep)
    named = named_arms(sweep)
    asked: list[tuple[str, int, Arm]] = []
    for (name, overrides), index in itertools.product(named.items(), range(len(places))):
        bare = arm_of(sweep, name, overrides, places[index])
        asked.append((name, index, bare))
        asked += [(name, index, arm_of(sweep, name, overrides, v | dict(places[index]))) for v in _ends(sweep, name)]
    found = resolved([_line(sweep, arm) for _, _, arm in asked], allow, program)
    spaces = []
    for name, overrides in named.items():
        hashes, sources = [], []
        for index in range(len(places)):
            own = [(arm, one) for (n, i, arm), one in zip(asked, found) if (n, i) == (name, index)]
            _refuse(sweep, own[1:])
            refuse_metric(sweep, [one for _, one in own[1:]])
            hashes.append(next(one["hash"] for _, one in own if "hash" in one))
            legs = {(one["source"], one["source_seed"]) for _, one in own[1:]}
            leg = next(iter(legs))
            sources.append({"source": leg[0], "source_seed": leg[1]} if len(legs) == 1 and leg[0] else None)
        parameters = tuple(p for p in parameters_of(sweep, name) if p.key not in DOMAINS)
        spaces.append(Space(name, overrides, parameters, places, tuple(hashes), tuple(sources)))
    root = Path(next(one["config"]["run"]["root"] for one in found if "config" in one)) / sweep.experiment
    return SearchPlan(sweep, tuple(spaces), root, tuple(f"--allow={package}" for package in allow))


def _line(sweep: SweepFile, arm: Arm) -> list[str]:
    named = [f"--config={sweep.config}", f"--experiment={sweep.experiment}"]
    return [*named, *arguments(arm.overrides), f"--arm={arm.name}"]


def _places(sweep: SweepFile) -> tuple[Mapping[str, Any], ...]:
    """The domains of each task; as in a grid, none from a domain to itself."""
    varied = [p for p in sweep.parameters if p.key in DOMAINS]
    found = [dict(zip([p.key for p in varied], v)) for v in itertools.product(*(p.values for p in varied))]
    pairs = [(place, [{**sweep.fixed, **place}.get(key) for key in DOMAINS]) for place in found]
    return tuple(place for place, (source, target) in pairs if source is None or source != target)


def _ends(sweep: SweepFile, name: str) -> Iterator[dict[str, Any]]:
    """Settings that hold every value of the listed parameters, and the ends of the others."""
    parameters = [p for p in parameters_of(sweep, name) if p.key not in DOMAINS]
    overrides = {**sweep.fixed, **named_arms(sweep)[name]}
    for index in range(max([2, *(len(p.values) for p in parameters)])):
        values: dict[str, Any] = {}
        for p in parameters:
            if applies(sweep, p, {**overrides, **values}):
                ends = p.values or (p.settings["min"], p.settings["max"])
                value = ends[index % len(ends)]
                values[p.key] = value if p.values else _scaled(p, value)
        yield values


def _scaled(parameter: Parameter, end: float) -> Any:
    if parameter.distribution == "int_uniform":
        return end
    return parameter.quantized(math.exp(end) if parameter.distribution == "log_uniform" else end)


def _refuse(sweep: SweepFile, tried: Sequence[tuple[Arm, Mapping[str, Any]]]) -> None:
    wrong = [f"arm {arm.label}: {one['error']}" for arm, one in tried if one.get("error")]
    if wrong:
        raise ConfigError("\n".join([f"{sweep.path}: values of the parameters are refused", *dict.fromkeys(wrong)]))


@dataclass
class _Trial:
    """A trial that has begun: its runs, which of them were handed out, and how they ended."""

    study: TrialStudy
    number: int
    runs: list[Run]
    alone: bool
    given: set[Path] = field(default_factory=set)
    over: dict[Path, Outcome] = field(default_factory=dict)

    def next(self) -> Run | None:
        """The next run; where the first may be ended early, the others wait for it."""
        left = [r for r in self.runs if r.folder.path not in self.given]
        if not left or (self.alone and self.given and not self.over):
            return None
        self.given.add(left[0].folder.path)
        return left[0]


class Search:
    """Supplies the local executor with the runs of trials, and tells Optuna how they end.

    One process searches an experiment at a time. Trials that a killed search left behind are gone on with first.

    Args:
        plan: the search.
        retry: try the values of failed trials again.

    Raises:
        RunError: another process searches this experiment.
    """

    def __init__(self, plan: SearchPlan, retry: bool = False) -> None:
        self.plan = plan
        plan.root.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(plan.root / ".search.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise RunError(f"another process searches {plan.root}; wait for it, or give it more --slots") from error
        self.studies = [plan.study(space) for space in plan.spaces]
        self._open: list[_Trial] = []
        for space, study in zip(plan.spaces, self.studies):
            if retry:
                study.try_again()
            for trial in study.unfinished():
                self._begin(space, study, trial)

    @property
    def trials_left(self) -> int:
        """Trials that are still to begin or to end, over all arms."""
        return sum(study.run_cap - study.asked for study in self.studies) + len(self._open)

    def close(self) -> None:
        """Let another process search."""
        self._lock.release()

    def next(self) -> Run | None:
        """The next run of a trial that has begun, else the first run of a new one, of the arm with fewest trials."""
        for trial in self._open:
            if run := trial.next():
                return run
        choices = [pair for pair in zip(self.plan.spaces, self.studies) if pair[1].left]
        if not choices:
            return None
        space, study = min(choices, key=lambda pair: pair[1].asked)
        return self._begin(space, study, study.ask()).next()

    def _begin(self, space: Space, study: TrialStudy, trial: Any) -> _Trial:
        runs = self.plan.runs(space, self.plan.values(space, trial), trial.number)
        begun = _Trial(study, trial.number, runs, self.plan.sweep.early_terminate is not None)
        self._open.append(begun)
        return begun

    def ended(self, outcome: Outcome) -> None:
        """Note a run's end; a trial ends with its last run, or with the first that failed or was ended early."""
        path = outcome.run.folder.path
        for trial in [t for t in self._open if any(r.folder.path == path for r in t.runs)]:
            trial.given.add(path)
            trial.over[path] = outcome
            if outcome.state is State.FINISHED and len(trial.over) < len(trial.runs):
                continue
            self._open.remove(trial)
            if outcome.state is State.FAILED:
                trial.study.tell(trial.number, "FAIL", error=outcome.reason)
            elif outcome.state is State.PRUNED:
                trial.study.tell(trial.number, "PRUNED")
            elif outcome.state is State.FINISHED:
                self._complete(trial)

    def _complete(self, trial: _Trial) -> None:
        metric = str(self.plan.sweep.metric)
        found = [run.folder.summary()["metrics"].get(metric) for run in trial.runs]
        values = [value for value in found if value is not None]
        if len(values) == len(found):
            trial.study.tell(trial.number, "COMPLETE", statistics.fmean(values))
            return
        error = f"{metric} is not in summary.json of {len(found) - len(values)} of {len(found)} runs"
        print(f"trial {trial.number} has no value: {error}", file=sys.stderr)
        trial.study.tell(trial.number, "FAIL", error=error)
