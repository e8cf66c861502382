import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reports.folders import write_run

from crossft.errors import RunError
from crossft.reports.records import domain_keys, find_runs, groups, headline, leaves, read_records, with_baseline
from crossft.runs import RunFolder, write_json


def test_every_run_is_a_row_whatever_became_of_it(tmp_path: Path) -> None:
    root = tmp_path / "pacs"
    write_run(root, "full", 0)
    write_run(root, "full", 1, None, None, status="failed", error="loss is nan")
    RunFolder.create(root / "killed", experiment="pacs", arm="full", seed=2)
    broken = RunFolder.create(root / "broken", experiment="pacs", arm="full", seed=3)
    broken.summary_file.write_text('{"schema": 1, "sta')
    records = read_records([tmp_path]).set_index("run")
    assert records["status"].to_dict() == {
        "broken": "unreadable",
        "full-s0-abcdef12": "finished",
        "full-s1-abcdef12": "failed",
        "killed": "running",
    }
    row = records.loc["full-s0-abcdef12"]
    assert (row["source"], row["target"], row["target/test/accuracy"]) == ("photo", "sketch", 0.8)
    assert np.isnan(records.loc["full-s1-abcdef12", "target/test/accuracy"])
    assert records.loc["full-s1-abcdef12", "error"] == "loss is nan"
    assert "not valid JSON" in records.loc["broken", "error"]
    assert records.loc["broken", "experiment"] == "pacs"


def test_find_runs_does_not_look_inside_a_run(tmp_path: Path) -> None:
    outer = write_run(tmp_path / "pacs", "full", 0)
    write_json(outer.wandb / "summary.json", {})
    assert find_runs([tmp_path, outer.path]) == [outer.path]
    with pytest.raises(RunError, match=r"nothing is not a folder; give run folders"):
        find_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"none holds a summary.json; run `crossft fit` first"):
        find_runs([tmp_path / "empty"])


def test_source_legs_are_no_arms(tmp_path: Path) -> None:
    root = tmp_path / "pacs"
    leg = write_run(root, "source", 0, target=None)
    write_run(root, "full", 0, parent=str(leg.path))
    write_run(root, "full", 1, parent=f"{leg.path}/checkpoints/last.ckpt")
    records = read_records([root])
    assert len(records) == 3
    assert set(leaves(records)["arm"]) == {"full"}


def test_an_arm_that_another_starts_from_is_an_arm(tmp_path: Path) -> None:
    """A linear probe, and what goes on from it; a run whose name is a folder above another's parent."""
    probe = write_run(tmp_path / "pacs", "probe", 0)
    write_run(tmp_path / "pacs", "probe-ft", 0, parent=str(probe.path))
    write_run(tmp_path / "pacs", tmp_path.name, 0)
    assert set(leaves(read_records([tmp_path]))["arm"]) == {"probe", "probe-ft", tmp_path.name}
    leg = write_run(tmp_path / "digits", "chain", 0)
    last = RunFolder.create(tmp_path / "digits" / "chain-s0-12345678", experiment="digits", arm="chain", seed=0)
    last.write_summary(parent=str(leg.path / "checkpoints" / "best.ckpt"))
    assert list(leaves(read_records([tmp_path / "digits"]))["path"]) == [str(last.path)]


@pytest.mark.parametrize(
    "wrong", [{"metrics": {"target/test/accuracy": "high"}}, {"domains": ["photo"]}, {"metrics": 3}]
)
def test_a_summary_of_other_types_hides_no_other_run(tmp_path: Path, wrong: dict[str, object]) -> None:
    write_run(tmp_path / "pacs", "full", 0)
    odd = write_run(tmp_path / "pacs", "odd", 0)
    write_json(odd.summary_file, {**json.loads(odd.summary_file.read_text()), **wrong})
    records = read_records([tmp_path]).set_index("arm")
    assert records.loc["full", "target/test/accuracy"] == 0.8
    assert records.loc[odd.path.name, "status"] == "unreadable"
    assert f"{odd.summary_file} is no summary of crossft" in records.loc[odd.path.name, "error"]


def test_groups_and_headline(tmp_path: Path) -> None:
    write_run(tmp_path / "pacs", "full", 0)
    write_run(tmp_path / "pacs", "other", 0, domains={"source": ["photo"], "target": ["art"]})
    broken = RunFolder.create(tmp_path / "pacs" / "z")
    broken.summary_file.write_text("")
    RunFolder.create(tmp_path / "pacs" / "y", arm="failed early").write_summary(status="failed")
    write_run(tmp_path / "digits", "full", 0)
    found = {title: list(runs["arm"]) for title, runs in groups(read_records([tmp_path]))}
    assert found == {
        "digits: photo → sketch": ["full"],
        "pacs: photo → sketch": ["full", "failed early", "z"],
        "pacs: photo → art": ["other"],
    }
    records = read_records([tmp_path / "pacs"])
    assert headline(records) == ["target/test/accuracy", "target/gain", "source/test/accuracy", "source/retention"]


def test_own_names_where_a_role_is_shared(tmp_path: Path) -> None:
    domains = {"source": ["photo", "art"], "target": ["sketch"], "eval": ["cartoon"]}
    metrics = {
        "photo/test/mae": 1.0,
        "photo/test/mae/before": 0.5,
        "photo/retention": 0.5,
        "art/test/mae": 1.0,
        "target/test/r2": 0.3,
        "target/test/mae": 2.0,
        "cartoon/test/mae": 3.0,
    }
    write_run(tmp_path / "p", "a", 0, domains=domains, primary={"target": "r2"}, metrics=metrics)
    records = read_records([tmp_path])
    assert domain_keys(records) == {"target": "target", "photo": "source", "art": "source", "cartoon": "eval"}
    expected = ["target/test/r2", "art/test/mae", "photo/test/mae", "photo/retention", "cartoon/test/mae"]
    assert headline(records) == expected  # what no run measured has no column


def test_baseline_stands_in_for_a_missing_before(tmp_path: Path) -> None:
    root = tmp_path / "adapt"
    for seed in (0, 1):
        write_run(root, "source-only", seed, metrics={"target/test/accuracy": 0.5, "source/test/accuracy": 0.8})
    write_run(root, "dann", 0, metrics={"target/test/accuracy": 0.75, "source/test/accuracy": 0.6})
    write_run(root, "dann", 2, metrics={"target/test/accuracy": 0.75, "source/test/accuracy": 0.6})  # no pair
    write_run(root, "kept", 0, target=0.75)  # knows its own before (0.5, as it happens 1.0 on the source)
    filled = with_baseline(read_records([root]), "source-only").set_index(["arm", "seed"])
    dann = filled.loc[("dann", 0)]
    assert dann["target/gain"] == pytest.approx(0.25)
    assert dann["source/retention"] == pytest.approx(0.75)
    assert np.isnan(filled.loc[("dann", 2), "target/gain"])
    assert filled.loc[("kept", 0), "source/retention"] == pytest.approx(0.9)


def test_500_folders_in_under_3_seconds(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "one", "a", 0).summary()
    for i in range(500):
        folder = tmp_path / "many" / f"a-s{i}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({**summary, "seed": i}))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # the machine may be busy with other things
    command = [sys.executable, "-X", "importtime", "-m", "crossft.cli", "compare", str(tmp_path / "many")]
    done = subprocess.run([*command, "--baseline=a"], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3
    assert "500" in done.stdout
    assert " torch\n" not in done.stderr
