"""A run that is killed and resumed ends at the bits of a run that nobody stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from crossft.callbacks.monitoring import latest_valid, load_checkpoint
from crossft.callbacks.monitoring.checkpoint_io import check, manifest_of
from crossft.errors import CheckpointError

HERE = Path(__file__).parent


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)])
    return {**os.environ, "PYTHONPATH": path, **extra}


def kill_and_resume(folder: Path, kills: int, timeout: float, *program: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(HERE / "harness.py"), str(folder), str(kills), *program],
        env=environment(CROSSFT_CACHE=str(folder / "cache")),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {len(rows)} kills: {done.stderr[-4000:]}"
    return rows


def test_four_kills(tmp_path: Path) -> None:
    """Vision on two processes with workers and accumulation, text on two processes, and two in phases."""
    rows = kill_and_resume(tmp_path, 2, 500, "2")
    assert len(rows) == 4
    assert [row["difference"] for row in rows] == [None] * 4


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path: Path) -> None:
    """Every cell of {vision, text} x {0, 2 workers} x {accumulation 1, 2} x {1, 2 processes}, and four more."""
    rows = kill_and_resume(tmp_path, 20, 3500)
    for row in rows:
        print(row)
    assert len(rows) == 20
    assert len({tuple(row["cell"]) for row in rows}) == 16
    assert [row for row in rows if row["difference"] is not None] == []


@pytest.mark.soak
def test_three_kills_in_a_sequence(tmp_path: Path) -> None:
    """In a pass for importance, within a leg, and between the last save of the first domain's leg and its end."""
    rows = kill_and_resume(tmp_path, 3, 400, "sequences")
    assert [row["kill"] for row in rows] == ["three/importance:2", "two/backward:3", "source/train_end:1"]
    assert [row["difference"] for row in rows] == [None] * 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifteen_kills_in_sequences(tmp_path: Path) -> None:
    """Every leg, at its epochs' ends and starts, in a pass for importance, and at random steps; 1 and 2 processes."""
    rows = kill_and_resume(tmp_path, 15, 3500, "sequences")
    for row in rows:
        print(row)
    assert len(rows) == 15
    assert {row["kill"].split("/")[0] for row in rows} == {"source", "two", "three"}
    assert [row for row in rows if row["difference"] is not None] == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_in_every_phase(tmp_path: Path) -> None:
    """Gradual unfreezing by every policy: weights, buffers, moments, rates, ``requires_grad``, modes; on 1x1 and 2x2.

    In each of the four phases a kill within an epoch and one at an epoch's beginning, and one where a phase begins.
    """
    rows = kill_and_resume(tmp_path, 0, 3500, "18")
    for row in rows:
        print(row)
    assert len({(*row["cell"], row["kill"]) for row in rows}) == 18
    assert [row for row in rows if row["difference"] is not None] == []


SAVER = """
import sys, torch
from pathlib import Path
from crossft.callbacks.monitoring import AtomicCheckpointIO
from crossft.callbacks.monitoring.checkpoint_io import publish
folder, start = Path(sys.argv[1]), int(sys.argv[2])
for step in range(start, start + 1000):
    weights = {str(i): torch.full((500_000,), float(step)) for i in range(8)}
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights}, folder / f"step-{step}.ckpt")
    publish(folder / f"step-{step}.ckpt", "last.ckpt")
    for old in folder.glob(f"step-{step - 3}.ckpt"):
        AtomicCheckpointIO().remove_checkpoint(old)
    print(step, flush=True)
"""


def other_file_system(folder: Path) -> Path:
    """A temporary folder on another file system than ``folder``; skipped where there is none."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == folder.stat().st_dev:
        pytest.skip("no second file system (/dev/shm) for TMPDIR")
    return Path(tempfile.mkdtemp(dir=memory))


def without_manifest(folder: Path, pattern: str) -> list[Path]:
    return [p for p in folder.glob(pattern) if not p.name.startswith(".") and not manifest_of(p).exists()]


def wait_for(point: str, draw: random.Random, folder: Path, saver: subprocess.Popen[str]) -> None:
    """Until a save has come to a point: a share of its bytes, its file renamed (no manifest yet), its publication."""
    if point == "bytes":
        halfway = draw.randint(1, 14_000_000)  # of about 16 million
        while not any(size_of(p) >= halfway for p in folder.glob(".tmp-*.ckpt")):
            assert saver.poll() is None
        return
    while not without_manifest(folder, point):
        assert saver.poll() is None
    time.sleep(draw.uniform(0, 0.002))


def check_what_is_left(folder: Path, acknowledged: int) -> int:
    """The newest valid checkpoint, and last.ckpt unless it is refused, are whole and no older than acknowledged."""
    newest = latest_valid(folder)
    assert newest is not None
    paths = [newest]
    try:
        check(folder / "last.ckpt")
        paths.append(folder / "last.ckpt")
    except CheckpointError:
        assert without_manifest(folder, "last.ckpt"), "only an interrupted publication leaves it without a manifest"
    for path in paths:
        loaded = load_checkpoint(path)
        assert loaded["global_step"] >= acknowledged
        for weight in loaded["state_dict"].values():
            assert (weight == loaded["global_step"]).all()
    return int(newest.stem[5:])


POINTS = ("bytes", "step-*.ckpt", "last.ckpt", "bytes")


def kill_while_saving(folder: Path, kills: int) -> None:
    """Kill a process in the middle of a save, each time; half of the kills come after the data are renamed."""
    draw = random.Random(5)
    temporary = other_file_system(folder)
    torn = start = attempts = 0
    while torn < kills:
        attempts += 1
        assert attempts <= 4 * kills, f"only {torn} of {attempts} kills hit a save"
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder), str(start)],
            env=environment(TMPDIR=str(temporary)),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert saver.stdout is not None
        acknowledged = int(saver.stdout.readline())  # the first save is done; it dies in one of the next
        wait_for(POINTS[torn % len(POINTS)], draw, folder, saver)
        os.killpg(saver.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in saver.stdout.read().split() if line.isdigit())])
        saver.wait()
        start = check_what_is_left(folder, acknowledged) + 1
        halves = [*folder.glob(".tmp-*"), *without_manifest(folder, "*.ckpt")]
        torn += bool(halves)
        for half in halves:  # so that the next kill is counted by its own
            half.unlink()
    assert not any(temporary.iterdir())  # nothing was written elsewhere and moved


def size_of(path: Path) -> int:
    """Bytes of a file that may vanish; 0 then."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_three_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 20)
