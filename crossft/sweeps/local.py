"""The local executor: a few processes at a time, one run each, on this machine.

What is done is read from the run folders. A run is started under a lock that its process inherits and that the system
releases when the last of them is gone: so a sweep that was killed, and started again while its runs still train, waits
for them instead of starting them twice. Such orphans count as runs of its own; runs that another sweep, or an element
of an array job, holds and waits for do not, so that several share the work.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from crossft.errors import ConfigError, Interrupted, RunError
from crossft.sweeps.locks import RunLock, locked, orphaned
from crossft.sweeps.plan import Plan, Run
from crossft.sweeps.state import State, clear, reason, source_finished, state_of, tail

__all__ = ["THREADS", "Local", "Outcome", "Supply", "Watcher", "cores", "judge"]

STOPPED = 143
"""Exit code of a run that saved and stopped on a signal."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that limit the threads of a process."""
_POLL, _POLL_ELSEWHERE, _GRACE = 0.1, 1.0, 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: the run.
        state: finished, failed, pruned, or unfinished where it was stopped or killed.
        reason: why, where it is not finished.
        seconds: since this sweep started it; 0 where it was finished before.
    """

    run: Run
    state: State
    reason: str = ""
    seconds: float = 0.0


class Watcher(Protocol):
    """Is told what happens, to show it."""

    def started(self, run: Run, slot: int, resumed: bool) -> None:
        """A run was started."""

    def ended(self, outcome: Outcome, slot: int | None) -> None:
        """A run ended, or was found ended (``slot`` None)."""

    def tick(self, active: Sequence[tuple[int, Run]]) -> None:
        """Called a few times a second."""


class Supply(Protocol):
    """Gives runs that no plan can list: each depends on how others ended."""

    def next(self) -> Run | None:
        """The next run for a free slot; None where there is none now."""

    def ended(self, outcome: Outcome) -> None:
        """A run ended, or was found ended."""


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    lock: RunLock
    began: float


@dataclass
class _Elsewhere:
    """A run that is held, by another process (a slot is taken where its owner is gone) or for another trial (taken)."""

    run: Run
    takes_slot: bool
    since: float


class Local:
    """Runs the plan with ``slots`` processes at a time.

    Args:
        plan: the sweep's plan.
        slots: number of runs at a time.
        threads: threads of each run; default: cores / slots.
        gpus: CUDA device numbers, dealt out to the slots; None leaves CUDA_VISIBLE_DEVICES as it is.
        retry: run failed arms again, from their last checkpoint where there is one.
        program: the command line; by default ``python -m crossft.cli``.
        supply: runs beside those of the plan, asked for when a slot is free and no run is waiting.

    Raises:
        ConfigError: ``slots`` or ``threads`` below 1.
    """

    def __init__(
        self,
        plan: Plan,
        slots: int = 1,
        threads: int | None = None,
        gpus: Sequence[int] | None = None,
        retry: bool = False,
        program: Sequence[str] | None = None,
        supply: Supply | None = None,
    ) -> None:
        if slots < 1 or (threads is not None and threads < 1):
            raise ConfigError(f"slots={slots}, threads={threads}: both must be at least 1")
        self.plan, self.slots, self.retry, self.supply = plan, slots, retry, supply
        self.threads = threads or max(1, cores() // slots)
        self.gpus = list(gpus or [])
        self.program = [*(program or [sys.executable, "-m", "crossft.cli"])]
        self._waiting = list(plan.runs)
        self._active: dict[int, _Active] = {}
        self._elsewhere: dict[Path, _Elsewhere] = {}
        self._ready: set[str] = set()
        self._outcomes: dict[Path, Outcome] = {}
        self._stopped = 0

    def run(self, watcher: Watcher) -> list[Outcome]:
        """Run what is left, and return what became of every run: in the plan's order, then in order of their end.

        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after the runs have saved and stopped.
        """
        self.plan.root.joinpath("logs").mkdir(parents=True, exist_ok=True)
        self._pass_over_finished(watcher)
        with self._signals():
            self._fill(watcher)
            while self._waiting or self._active or self._elsewhere:
                if self._stopped:
                    self._stop(watcher)
                self._reap(watcher)
                self._fill(watcher)
                watcher.tick([(slot, active.run) for slot, active in self._active.items()])
                time.sleep(_POLL)
        planned = [self._outcomes.pop(run.folder.path) for run in self.plan.runs]
        return planned + list(self._outcomes.values())

    def _pass_over_finished(self, watcher: Watcher) -> None:
        for run in list(self._waiting):
            if source_finished(run.folder) and run.source is not None:
                self._ready.add(run.source)
            if state_of(run.folder) is State.FINISHED:
                self._waiting.remove(run)
                self._end(Outcome(run, State.FINISHED), None, watcher)

    # -- which run is next --------------------------------------------------------------------------------------

    def _fill(self, watcher: Watcher) -> None:
        """Start runs in the free slots; look again at those that another process had a while ago."""
        for held in list(self._elsewhere.values()):
            if time.monotonic() - held.since >= _POLL_ELSEWHERE:
                del self._elsewhere[held.run.folder.path]
                self._try(held.run, watcher)
        while self._taken() < self.slots and not self._stopped:
            chosen = self._next() or self._supplied()
            if chosen is None:
                return
            if chosen in self._waiting:
                self._waiting.remove(chosen)
            self._try(chosen, watcher)

    def _taken(self) -> int:
        """Number of slots in use: by runs of this sweep, and by orphans, which load the machine as they do.

        A trial whose values are just being run takes one too: a search is not asked ahead of its results.
        """
        return len(self._active) + sum(held.takes_slot for held in self._elsewhere.values())

    def _next(self) -> Run | None:
        """One run for each source leg first, then those whose source is there; none that would wait for a source."""
        busy = [active.run for active in self._active.values()] + [held.run for held in self._elsewhere.values()]
        for run in busy:
            if run.source is not None and run.source not in self._ready and source_finished(run.folder):
                self._ready.add(run.source)
        fitting = {run.source for run in busy if run.source not in self._ready} - {None}
        needs = [run for run in self._waiting if run.source is not None and run.source not in self._ready]
        free = [run for run in self._waiting if run not in needs]
        leaders = [run for run in needs if run.source not in fitting]
        return next(iter(leaders + free), None)

    def _supplied(self) -> Run | None:
        return None if self.supply is None or self._waiting else self.supply.next()

    # -- one run ------------------------------------------------------------------------------------------------

    def _try(self, run: Run, watcher: Watcher) -> None:
        """Start a run under its lock, unless another process has it, nothing is left to do, or no slot is free."""
        file = run.log.with_suffix(".lock")
        lock = locked(file)
        if lock is None:
            mine = run.folder.path in {active.run.folder.path for active in self._active.values()}
            self._elsewhere[run.folder.path] = _Elsewhere(run, mine or orphaned(file), time.monotonic())
            return
        state = state_of(run.folder)
        if state.ended or (state is State.FAILED and not self.retry):
            lock.release()
            why = "" if state is State.FINISHED else reason(run.folder, run.log)
            self._end(Outcome(run, state, why), None, watcher)
            return
        if self._taken() >= self.slots or self._stopped:
            lock.release()
            self._waiting.append(run)
            return
        slot = next(n for n in range(self.slots + 1) if n not in self._active)
        try:
            fresh = clear(run.folder)
            process = self._spawn(run, slot, fresh, lock)
        except (RunError, OSError) as error:
            with suppress(RunError, OSError):
                _record(run, "failed", str(error))
            lock.release()
            self._end(Outcome(run, State.FAILED, str(error)), None, watcher)
            return
        self._active[slot] = _Active(run, process, lock, time.monotonic())
        watcher.started(run, slot, not fresh)

    def _spawn(self, run: Run, slot: int, fresh: bool, lock: RunLock) -> subprocess.Popen[bytes]:
        words = ["fit", *run.flags] if fresh else ["resume", str(run.folder.path), *run.allow]
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads)), "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            mine = self.gpus[slot :: self.slots] or [self.gpus[slot % len(self.gpus)]]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        with run.log.open("ab") as log:
            log.write(f"$ crossft {shlex.join(words)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [*self.program, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.run],
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops its runs in order
            )

    def _reap(self, watcher: Watcher) -> None:
        for slot, active in list(self._active.items()):
            code = active.process.poll()
            if code is None:
                continue
            del self._active[slot]
            if active.run.source is not None and source_finished(active.run.folder):
                self._ready.add(active.run.source)
            try:
                state, why = judge(active.run, code)
            except (RunError, OSError) as error:  # a full disk, say: the other runs go on
                state, why = State.FAILED, str(error)
            active.lock.release()
            self._end(Outcome(active.run, state, why, time.monotonic() - active.began), slot, watcher)

    def _end(self, outcome: Outcome, slot: int | None, watcher: Watcher) -> None:
        self._outcomes[outcome.run.folder.path] = outcome
        watcher.ended(outcome, slot)
        if self.supply is not None:
            self.supply.ended(outcome)

    # -- stopping -----------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        ours = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        former = {number: signal.signal(number, self._flag) for number in ours}  # nohup's ignored SIGHUP stays so
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _flag(self, signum: int, frame: FrameType | None) -> None:
        self._stopped += 1

    def _stop(self, watcher: Watcher) -> None:
        """Let every run save and stop; a second signal, or a long wait, kills them."""
        for active in self._active.values():
            active.process.terminate()
        began, first = time.monotonic(), self._stopped
        while self._active and self._stopped == first and time.monotonic() - began < _GRACE:
            self._reap(watcher)
            time.sleep(_POLL)
        for active in self._active.values():
            with suppress(ProcessLookupError):
                os.killpg(active.process.pid, signal.SIGKILL)  # its session: other ranks, loaders of data
            active.process.wait()
        self._reap(watcher)
        if self.supply is not None:
            raise Interrupted("the search was stopped; the same command goes on with it")
        left = len(self.plan.runs) - sum(o.state is not State.UNFINISHED for o in self._outcomes.values())
        raise Interrupted(f"the sweep was stopped, {left} runs are left; the same command goes on with them")


def judge(run: Run, code: int) -> tuple[State, str]:
    """What became of a run whose process ended; the folder learns it where the process could not say."""
    state = state_of(run.folder)
    if state is State.FINISHED and code == 0:
        return state, ""
    if state in (State.FAILED, State.PRUNED):
        return state, reason(run.folder, run.log)
    if code == STOPPED or code < 0:
        why = "stopped by a signal" if code == STOPPED else f"killed by {_signal_name(-code)}"
        if not run.folder.summary_file.is_file() or run.folder.summary()["status"] == "running":
            _record(run, "interrupted", why)
        return State.UNFINISHED, why
    why = tail(run.log) or f"it ended with exit code {code} and no result"
    _record(run, "failed", why)
    return State.FAILED, why


def _record(run: Run, status: str, why: str) -> None:
    """Write into the run's folder what became of it, so that it is in every comparison."""
    run.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    names = {"experiment": run.folder.path.parent.name, "arm": run.arm.name, "seed": run.seed}
    run.folder.write_summary(status=status, error=why, **names)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
