import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from crossft import runs
from crossft.errors import ConfigError, RunError
from crossft.runs import (
    MetricRow,
    MetricsCsv,
    RunFolder,
    config_hash,
    higher_is_better,
    read_json,
    read_metrics,
    replacing,
    run_id,
    versions,
    write_atomic,
    write_json,
)


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    write_atomic(target, "one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_atomic(target, "old")
    parents: list[Path] = []

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            parents.append(temporary.parent)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert parents == [target.parent]  # a rename across file systems would not be atomic
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_and_folder_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), real_replace(self, to))[1])
    write_atomic(tmp_path / "file", "x")
    assert events == ["fsync", "rename", "fsync"]


def test_json_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": float("nan"), "a": (1, np.float32(0.5)), "c": [float("inf")], "d": Path("x"), "e": {2, 1}})
    assert json.loads(path.read_text()) == {"a": [1, 0.5], "b": None, "c": [None], "d": "x", "e": [1, 2]}
    assert read_json(path)["a"] == [1, 0.5]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path)["a"] == [1, 0.5]


def test_bad_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(RunError, match=r"summary\.json"):
        read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(RunError, match=r"summary.json is not valid JSON"):
        read_json(path)


def test_create_open_and_merge(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "pacs" / "a-s0-1f", experiment="pacs", arm="a", seed=0)
    first = folder.summary()
    assert (first["schema"], first["status"], first["arm"], first["seed"]) == (1, "running", "a", 0)
    assert first["versions"]["torch"]
    assert first["error"] is None
    assert first["metrics"] == {}
    folder.write_summary(metrics={"target/test/accuracy": 0.5, "source/retention": float("nan")})
    folder.write_summary(status="finished", metrics={"target/gain": 0.1}, domains={"source": ["photo"]})
    summary = RunFolder.open(folder.path).summary()
    assert summary["metrics"] == {"source/retention": None, "target/gain": 0.1, "target/test/accuracy": 0.5}
    assert summary["status"] == "finished"
    assert summary["arm"] == "a"
    assert summary["domains"] == {"source": ["photo"]}
    with pytest.raises(ConfigError, match=r"status='done'.*interrupted"):
        folder.write_summary(status="done")


@pytest.mark.parametrize("inside", ["checkpoints/last.ckpt", "checkpoints/sharded/shard.0", "metrics.csv", "."])
def test_open_accepts_a_path_inside(tmp_path: Path, inside: str) -> None:
    folder = RunFolder.create(tmp_path / "run")
    path = folder.path / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    if inside != ".":
        path.write_text("")
    assert RunFolder.open(path).path.resolve() == folder.path.resolve()


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist; give a run folder"):
        RunFolder.open(tmp_path / "no")
    (tmp_path / "config.yaml").write_text("")  # a file of the working folder makes no run of what lies below
    (tmp_path / "runs").mkdir()
    with pytest.raises(RunError, match=r"is not a run folder.*crossft fit"):
        RunFolder.open(tmp_path / "runs")


def test_create_refuses_a_taken_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match=r"unfinished.*crossft resume .*run`"):
        RunFolder.create(folder.path)
    for status in ("failed", "interrupted"):
        folder.write_summary(status=status)
        with pytest.raises(RunError, match=f"status {status}.*crossft resume"):
            RunFolder.create(folder.path)
    folder.write_summary(status="finished")
    with pytest.raises(RunError, match=r"finished run.*--run.dir"):
        RunFolder.create(folder.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"notes.txt.*--run.dir"):
        RunFolder.create(tmp_path / "other")
    (tmp_path / "died" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="died before it began"):
        RunFolder.create(tmp_path / "died")


def test_one_of_many_creators_wins(tmp_path: Path) -> None:
    won: list[RunFolder] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        with contextlib.suppress(RunError):
            won.append(RunFolder.create(tmp_path / "run"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    write_json(folder.summary_file, {"schema": 2})
    with pytest.raises(RunError, match="schema 2, newer than 1; update crossft"):
        folder.summary()
    write_json(folder.summary_file, [1])
    with pytest.raises(RunError, match="no JSON object"):
        folder.summary()


def test_config_hash() -> None:
    config = {"a": 1, "run": {"dir": "x", "arm": "m"}, "list": [1, 2.5, None]}
    same = {"list": [1, 2.5, None], "run": {"arm": "m", "dir": "x"}, "a": 1}
    assert config_hash(config) == config_hash(same) == "9f4411c1d05cf4de"  # pinned: stable over processes and versions
    assert config_hash({**config, "a": 2}) != config_hash(config)
    moved = {**config, "run": {"dir": "elsewhere", "arm": "m"}}
    assert config_hash(moved) != config_hash(config)
    assert config_hash(moved, ignore=["run.dir"]) == config_hash(config, ignore=["run.dir"])
    assert config_hash({"dir": 1}, ignore=["run.dir"]) != config_hash({"dir": 2}, ignore=["run.dir"])


def test_run_id() -> None:
    assert run_id("gradual", 0, "1f3a92bc00") == "gradual-s0-1f3a92bc"
    assert run_id("../a b/c", 3, "abc") == "a-b-c-s3-abc"
    assert run_id("..", 3, "abc") == "run-s3-abc"


def test_higher_is_better() -> None:
    assert higher_is_better("target/test/accuracy")
    assert higher_is_better("r2")
    assert not higher_is_better("mae")
    assert not higher_is_better("source/test/mse/before")


def test_import_is_light() -> None:
    heavy = "sorted({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    code = f"import sys, crossft.runs; crossft.runs.versions(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"python", "torch", "lightning"} <= set(versions())
    assert set(runs.__all__) <= set(dir(runs))


def test_metrics_round_trip(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.append(1, 0, {"loss": 0.1 + 0.2, 'odd,"name"': 1})
    log.append(2, 0, {"target/val/auroc": None})
    rows = read_metrics(log.path)  # readable while open
    assert rows[:2] == [MetricRow(1, 0, "loss", 0.1 + 0.2), MetricRow(1, 0, 'odd,"name"', 1.0)]
    assert rows[2].name == "target/val/auroc"
    assert np.isnan(rows[2].value)
    log.append(1, 0, {"loss": 7.0})  # written again after a resume: the later counts
    assert [(r.step, r.value) for r in read_metrics(log.path) if r.name == "loss"] == [(1, 7.0)]
    log.close()


def test_metrics_survive_a_kill_at_any_byte(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    for step in range(3):
        log.append(step, 0, {"loss": step + 0.25})
    log.close()
    data = log.path.read_bytes()
    for size in range(len(data) + 1):
        cut = tmp_path / f"cut{size}.csv"
        cut.write_bytes(data[:size])
        whole = max(0, data[:size].count(b"\n") - 1)
        assert len(read_metrics(cut)) == whole
        again = MetricsCsv(cut)
        again.append(9, 1, {"loss": 5.0})
        again.close()
        assert [r.step for r in read_metrics(cut)] == [*range(whole), 9]


def test_truncate_on_resume(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.truncate(3)  # nothing there yet
    for step in range(1, 6):
        log.append(step, 0, {"a,b": step})
    log.truncate(3)
    log.append(4, 1, {"a,b": 40})
    assert [(r.step, r.value) for r in read_metrics(log.path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    log.close()


def test_malformed_metrics_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,name,value\n1,0,loss,0.5\n2,0,loss\n3,0,loss,0.1\n")
    with pytest.raises(RunError, match="line 3 is not step,epoch,name,value"):
        read_metrics(path)
    with pytest.raises(RunError, match="logged nothing yet"):
        read_metrics(tmp_path / "no.csv")
