"""A real SLURM on this machine, for as long as a test needs it: munged, slurmctld and slurmd, as the user who calls.

Nothing of the system's own SLURM is read or written: keys, state, sockets and ports are the cluster's own, and it is
found by SLURM_CONF. As a program it prints that variable and runs until it is told to stop:

    python tests/cluster/local_slurm.py FOLDER
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONFIG = """
ClusterName=crossft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=local Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Which of the programs are not installed; empty where a cluster can be started."""
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None)


def _ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _write(folder: Path, cpus: int) -> dict[str, str]:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    controller, node = _ports(2)
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    config.write_text(CONFIG.format(host=host, controller=controller, node=node, user=user, folder=folder, cpus=cpus))
    return {"SLURM_CONF": str(config), "PATH": SEARCH}


def _commands(folder: Path, config: str) -> dict[str, list[str]]:
    at = {name: f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    return {
        "munged": ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *at.values()],
        "slurmctld": ["slurmctld", "-D", "-c", "-f", config],
        "slurmd": ["slurmd", "-D", "-f", config],
    }


@contextlib.contextmanager
def cluster(cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start the cluster, yield the environment variables that name it, and stop it.

    Its folder is a short one of its own: a socket's path is limited to 108 characters.

    Raises:
        RuntimeError: the node does not come up within 30 seconds; the message holds the ends of the logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="crossft-slurm-"))
    running: list[subprocess.Popen[bytes]] = []
    try:
        names = _write(folder, cpus)
        environment = {**os.environ, **names}
        for name, command in _commands(folder, names["SLURM_CONF"]).items():
            with (folder / f"{name}.out").open("wb") as out:
                running.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                )
            if name == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _said(["sinfo", "-h", "-o", "%T"], environment) == "idle", folder)
        yield names
        subprocess.run(["scancel", "--full", "--state=RUNNING"], env=environment, check=False, timeout=30)
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _wait(condition: object, folder: Path, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > until:
            logs = {
                p.name: p.read_text(errors="replace")[-500:] for p in [*folder.glob("*.log"), *folder.glob("*.out")]
            }
            raise RuntimeError(f"SLURM did not start: {logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with cluster() as names:
        print("export " + " ".join(f"{key}={value}" for key, value in names.items()), flush=True)
        signal.pause()
