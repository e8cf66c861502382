"""Frontiers on numbers: areas by hand, fronts over all methods, WiSE-FT lines beside trained strengths."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from folders import write_run

from crossft.cli import main
from crossft.errors import RunError
from crossft.reports.records import groups, leaves, read_records
from crossft.reports.strengths import BLENDS, frontiers, hypervolume, with_blends


def test_areas_by_hand() -> None:
    assert hypervolume([]) == 0.0
    assert hypervolume([(0.9, 0.4)]) == pytest.approx(0.36)
    assert hypervolume([(1.0, 0.2), (0.5, 0.4)]) == pytest.approx(1.0 * 0.2 + 0.5 * 0.2)
    assert hypervolume([(1.0, 0.2), (0.5, 0.4), (0.4, 0.3), (0.9, -0.1)]) == hypervolume([(1.0, 0.2), (0.5, 0.4)])
    assert hypervolume([(0.5, 0.4), (1.0, 0.2)]) == hypervolume([(1.0, 0.2), (0.5, 0.4)])
    assert hypervolume([(1.0, 0.5)], reference=(0.5, 0.25)) == pytest.approx(0.125)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Before, the source has 1.0 and the target 0.5; two seeds, 0.02 apart on the target."""
    root = tmp_path / "trade"
    for seed in (0, 1):
        s = 0.02 * seed
        plain = write_run(root, "plain", seed, target=0.9 + s, source=0.4)
        write_run(root, "ewc,weight=10", seed, target=0.85 + s, source=0.7)
        write_run(root, "ewc,weight=1000", seed, target=0.7 + s, source=0.95)
        write_run(root, "l2sp,weight=1", seed, target=0.65 + s, source=0.9)
        (plain.path / BLENDS).write_text(
            "model,source/test/accuracy,target/test/accuracy\n"
            f"alpha 0,1.0,0.5\nalpha 0.5,0.8,{0.8 + s}\nalpha 1,0.4,{0.9 + s}\nuniform soup,0.1,0.1\n"
        )
    return root


def test_methods_are_ordered_by_what_they_dominate(experiment: Path) -> None:
    ((_, runs),) = groups(with_blends(leaves(read_records([experiment]))))
    found = {f.method: f for f in frontiers(runs)}
    assert list(found) == ["ewc", "plain+wiseft", "plain", "l2sp"]
    ewc = found["ewc"]
    assert [p.strength for p in ewc.points] == ["weight=1000", "weight=10"]
    assert [p.retention.mean for p in ewc.points] == [0.95, 0.7]
    by_seed = [0.95 * (0.2 + s) + 0.7 * 0.15 for s in (0.0, 0.02)]
    assert ewc.hypervolume.mean == pytest.approx(sum(by_seed) / 2)
    assert ewc.hypervolume.n == 2
    assert ewc.best(0.9).mean == pytest.approx(0.21)
    assert found["l2sp"].best(0.95) is None
    line = found["plain+wiseft"]
    assert [p.strength for p in line.points] == ["alpha=0", "alpha=0.5", "alpha=1"]
    assert line.points[1].retention.mean == pytest.approx(0.8)
    assert line.points[1].gain.mean == pytest.approx(0.31)
    on = {(f.method, p.strength) for f in found.values() for p in f.points if p.front}
    assert ("ewc", "weight=1000") in on
    assert ("ewc", "weight=10") in on
    assert ("plain+wiseft", "alpha=0.5") in on  # 0.8 and 0.31: nothing has both
    assert ("l2sp", "weight=1") not in on


def test_the_command_writes_picture_and_points(experiment: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "frontier.png"
    assert main(["frontier", str(experiment), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trade: photo → sketch" in printed
    assert "1000" in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert len(rows) == 2 + 1 + 1 + 3
    row = next(r for r in rows if r["strength"] == "weight=10")
    assert (float(row["retention"]), float(row["gain"]), row["seeds"]) == (0.7, pytest.approx(0.36), "2")


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys) -> None:
    root = tmp_path / "none"
    folder = write_run(root, "plain", 0)
    folder.write_summary(metrics={"target/gain": None})
    assert main(["frontier", str(root)]) == 1
    assert "target gain and source retention" in capsys.readouterr().out
    assert main(["frontier", str(root), "--output", "x.pdf"]) == 2
    bad = write_run(tmp_path / "bad", "plain", 0)
    (bad.path / BLENDS).write_text("nothing\n1\n")
    with pytest.raises(RunError, match="not a table of blends"):
        with_blends(read_records([tmp_path / "bad"]))
