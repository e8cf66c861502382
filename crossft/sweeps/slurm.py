"""The SLURM executor: one array job, an element a run, submitted through submitit.

What is done is read from the run folders, as everywhere; which runs are in the queue, from the queue. An element starts
its run, or continues it, whatever has happened to it before: so a requeue, a second submission and a local sweep of the
same file go on with the same runs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from crossft.errors import ConfigError, RunError
from crossft.runs import write_atomic
from crossft.sweeps.local import STOPPED, THREADS, judge
from crossft.sweeps.locks import RunLock, locked
from crossft.sweeps.plan import Plan, Run
from crossft.sweeps.state import State, source_finished, state_of, tail

__all__ = ["Element", "Request", "Submitted", "requeue", "submit", "tasks"]

_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers send ahead of a time limit."""
_PATIENCE, _POLL = 120.0, 1.0
"""Seconds that an element waits for the lock of a run, which a node that went down keeps for a while, and how often."""


@dataclass(frozen=True)
class Request:
    """What each run asks SLURM for.

    Attributes:
        partition: default: the cluster's.
        time: time limit, as sbatch takes it; default: the partition's.
        gpus: GPUs on each node; default: ``trainer.devices`` where ``trainer.accelerator`` is gpu or cuda, else none.
        cpus: processor cores of each process, and its threads.
        parallel: runs at a time; default: no limit of ours.
        more: further options of sbatch, by name without dashes; True for one that has no value.
    """

    partition: str | None = None
    time: str | None = None
    gpus: int | None = None
    cpus: int = 1
    parallel: int | None = None
    more: Mapping[str, str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Submitted:
    """What a submission found and did.

    Attributes:
        states: every run's state, in the plan's order.
        queued: runs that the queue holds already, or still runs, by folder; with their jobs.
        submitted: runs submitted now, by folder; with their jobs.
        sources: the job of the source legs that they wait for, or None.
    """

    states: Mapping[Path, State]
    queued: Mapping[Path, str]
    submitted: Mapping[Path, str]
    sources: str | None


def submit(plan: Plan, request: Request, retry: bool = False, program: Sequence[str] | None = None) -> Submitted:
    """Submit what is left of the plan: its source legs as one array, its runs as another that waits for the first.

    A source leg is fitted by one element, so no node waits for a lock while another trains. Runs are submitted that
    are neither finished nor in the queue; failed ones only with ``retry``.

    Args:
        plan: the sweep's plan.
        request: what each run asks SLURM for.
        retry: submit failed runs as well; they go on from their last checkpoint.
        program: the command line; by default ``python -m crossft.cli``.

    Raises:
        ConfigError: submitit or SLURM's commands are missing, or runs differ in their numbers of processes.
        RunError: SLURM refuses the submission.
    """
    _import_submitit()
    logs = plan.root / "logs"
    (logs / "slurm").mkdir(parents=True, exist_ok=True)
    with FileLock(logs / "slurm" / ".lock"):
        states = {run.folder.path: state_of(run.folder) for run in plan.runs}
        alive = _in_queue()
        queued = {run.folder.path: job for run in plan.runs if (job := _job(run)) in alive}
        wanted = {State.MISSING, State.UNFINISHED} | ({State.FAILED} if retry else set())
        left = [r for r in plan.runs if states[r.folder.path] in wanted and r.folder.path not in queued]
        if not left:
            return Submitted(states, queued, {}, None)
        executor = _executor(plan, request, tasks(left), logs / "slurm")
        command = tuple(program or (sys.executable, "-m", "crossft.cli"))
        sources = [Element(run, request.cpus, command, source=True) for run in _sources(plan, left)]
        first = _array(_submitted(executor, sources))
        if first is not None:
            executor.update_parameters(dependency=f"afterany:{first}")
        jobs = _submitted(executor, [Element(run, request.cpus, command) for run in left])
        submitted = {run.folder.path: str(job.job_id) for run, job in zip(left, jobs, strict=True)}
        for run in left:
            write_atomic(run.log.with_suffix(".job"), submitted[run.folder.path])
        return Submitted(states, queued, submitted, first)


def _import_submitit() -> Any:
    """The library that talks to sbatch.

    Raises:
        ConfigError: it is not installed, or this machine has no SLURM.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "crossft sweep slurm needs submitit; install it with: pip install 'crossft[slurm]'"
        ) from error
    if submitit.SlurmExecutor.affinity() < 0:
        raise ConfigError(
            "crossft sweep slurm needs SLURM's commands (sbatch, srun, squeue), which this machine lacks; call it on a "
            "login node, or use crossft sweep run"
        )
    return submitit


def tasks(runs: Sequence[Run]) -> tuple[int, int, bool]:
    """Nodes of each run, its processes on each node, 0 where its GPUs decide, and whether it asks for GPUs.

    Raises:
        ConfigError: runs differ, so they are no array.
    """
    found = {(int(r.trainer.get("num_nodes") or 1), _devices(r.trainer.get("devices")),
              r.trainer.get("accelerator") in ("gpu", "cuda")) for r in runs}  # fmt: skip
    if len(found) > 1:
        raise ConfigError(
            "runs differ in trainer.num_nodes, trainer.devices or trainer.accelerator, and the elements of one array "
            "job do not; put them into sweep files of their own"
        )
    return found.pop()


def _devices(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return len(value)
    words = str(value).strip()
    return len(words.split(",")) if "," in words else int(words) if words.isdigit() else 0


def _executor(plan: Plan, request: Request, needs: tuple[int, int, bool], folder: Path) -> Any:
    nodes, processes, on_gpus = needs
    processes = processes or request.gpus or 1
    executor = _import_submitit().SlurmExecutor(folder)
    executor.update_parameters(
        job_name=plan.sweep.experiment,
        partition=request.partition,
        time=request.time,
        nodes=nodes,
        ntasks_per_node=processes,
        gpus_per_node=request.gpus if request.gpus is not None else processes if on_gpus else None,
        cpus_per_task=request.cpus,
        array_parallelism=request.parallel or len(plan.runs),
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, **request.more},
        srun_args=[f"--cpus-per-task={request.cpus}"],
    )
    return executor


def _sources(plan: Plan, left: Sequence[Run]) -> list[Run]:
    """One run for each source leg that is not known to be finished."""
    ready = {run.source for run in plan.runs if run.source is not None and source_finished(run.folder)}
    return list({run.source: run for run in left if run.source is not None and run.source not in ready}.values())


def _array(jobs: Sequence[Any]) -> str | None:
    return str(jobs[0].job_id).split("_")[0] if jobs else None


def _submitted(executor: Any, elements: Sequence[Element]) -> list[Any]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return list(executor.map_array(Element.__call__, elements)) if elements else []
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"SLURM refuses the jobs: {' '.join(str(error).split())}") from error


def _job(run: Run) -> str | None:
    """The job that the run was last submitted as."""
    file = run.log.with_suffix(".job")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _in_queue() -> set[str]:
    """This user's jobs, array elements one by one, that wait or run.

    Raises:
        RunError: the queue cannot be read, so a run might be submitted twice.
    """
    done = subprocess.run(
        ["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"squeue says: {' '.join(done.stderr.split())}")
    return set(done.stdout.split())


@dataclass(frozen=True)
class Element:
    """What one element of an array does: one run, or the source leg of one.

    SLURM sends its signals to every process. The run saves at its next step, asks for a requeue where its time is
    over, and ends; the element waits for that. Where it still waits for the run's lock, it ends and asks itself.

    Attributes:
        run: the run.
        threads: of each process.
        program: the command line.
        source: fit the run's source, and stop.
    """

    run: Run
    threads: int
    program: tuple[str, ...]
    source: bool = False

    @property
    def log(self) -> Path:
        """What its first process prints."""
        return self.run.log.with_name(f"source-{self.run.source}.log") if self.source else self.run.log

    def __call__(self) -> str:
        """Do it, in each of its processes; the first has the lock and keeps the log.

        Returns:
            What came of it.

        Raises:
            RunError: the run did not finish, or a signal came while another process had it, so that SLURM counts the
                element as failed.
        """
        received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, *_REQUEUE, signal.SIGCONT):
            signal.signal(number, lambda signum, frame: received.append(signum))  # SIG_IGN is inherited by the run
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lock = self._locked(received) if first else None
        try:
            code = self._start(lock)
            if not first:
                return f"exit code {code}"
            state, why = self._judge(code)
        finally:
            if lock is not None:
                lock.release()
        if not state.ended:
            raise RunError(f"{self.run.name}: {state.value}: {why}")
        return state.value

    def _locked(self, received: Sequence[int]) -> RunLock:
        """Take the run's lock; wait for it for a while, or until a signal comes."""
        path, until = self.log.with_suffix(".lock"), time.monotonic() + _PATIENCE
        while True:
            lock = locked(path)
            stops = [signal.Signals(number) for number in received if number != signal.SIGCONT]
            if stops:
                if lock is not None:
                    lock.release()
                why = f"stopped by {stops[0].name} before it began, waiting for {path}"
                raise RunError(f"{self.run.name}: {why}{_requeued(stops)}")
            if lock is not None:
                return lock
            if time.monotonic() > until:
                raise RunError(f"{path} is locked: another process runs this; it goes on there")
            time.sleep(_POLL)

    def _start(self, lock: RunLock | None) -> int:
        """Run it to its end; the first process has the lock, which its run inherits."""
        words = ["fit", *self.run.flags, "--run.resume=true", *(["--run.only_source=true"] if self.source else [])]
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads)), "PYTHONUNBUFFERED": "1"}
        if lock is None:
            return subprocess.run([*self.program, *words], env=environment, check=False).returncode
        with self.log.open("ab") as log:
            log.write(f"$ crossft {shlex.join(words)}\n".encode())
            log.flush()
            done = subprocess.run(
                [*self.program, *words],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.run],
                check=False,
            )
        return done.returncode

    def _judge(self, code: int) -> tuple[State, str]:
        if not self.source:
            return judge(self.run, code)
        if code in (0, STOPPED) or code < 0:
            return (State.UNFINISHED if code else State.FINISHED), f"exit code {code}"
        return State.FAILED, tail(self.log)


def _requeued(stops: Sequence[signal.Signals]) -> str:
    """Queue this element again where a signal asks for it, as its run would; in words, to be added to the others."""
    if "SLURM_JOB_ID" not in os.environ or not set(stops) & set(_REQUEUE):
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's answer to a requeue, which scontrol gets too
    return f"; {requeue(os.environ['SLURM_JOB_ID'])}"


def requeue(job: str) -> str:
    """Put a SLURM job, of an array this process's element, back into the queue.

    Returns:
        What came of it, to be printed.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # an element's own number may be that of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        wrong = (done.stderr or done.stdout).strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    return f"SLURM job {job} is not requeued: {wrong}" if wrong else f"SLURM job {job} is requeued"
