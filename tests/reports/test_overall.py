from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reports.folders import write_run

from crossft.reports.overall import RANK, _column, overall
from crossft.reports.page import write_page
from crossft.reports.records import read_records
from crossft.reports.tables import ArmTable

TASKS = {"sketch": 0.0, "cartoon": 0.2, "art": -0.1}
SEEDS = 4


def on(target: str, **fields: Any) -> dict[str, Any]:
    return {"domains": {"source": ["photo"], "target": [target]}, **fields}


@pytest.fixture
def table(tmp_path: Path) -> ArmTable:
    for target, shift in TASKS.items():
        root = tmp_path / target / "pacs"
        for seed in range(SEEDS):
            noise = 0.01 * seed
            write_run(root, "base", seed, 0.5 + shift + noise, **on(target))
            write_run(root, "better", seed, 0.6 + shift + noise, **on(target))
            write_run(root, "mixed", seed, 0.5 + 3 * shift + 2 * noise, **on(target))
        write_run(root, "partly", 0, 0.9, **on(target, status="finished" if target == "art" else "failed"))
    (found,) = overall(read_records([tmp_path]), "base")
    return found


def test_values_are_means_over_tasks_with_intervals_over_seeds(table: ArmTable) -> None:
    assert table.title == "pacs: over 3 tasks"
    cell = table.cells["base", "target/test/accuracy"]
    assert cell.value.mean == pytest.approx(0.5 + 0.1 / 3 + 0.015)
    assert cell.value.n == SEEDS
    assert cell.value.sd == pytest.approx(0.01 * (5 / 3) ** 0.5)
    assert table.cells["partly", "target/test/accuracy"].value.n == 0
    assert table.runs == {"base": "12", "better": "12", "mixed": "12", "partly": "1, 2 failed"}


def test_a_task_that_nothing_finished_is_named(tmp_path: Path) -> None:
    for target in TASKS:
        status = "failed" if target == "cartoon" else "finished"
        write_run(tmp_path / target / "pacs", "base", 0, **on(target, status=status))
    (found,) = overall(read_records([tmp_path]))
    assert found.title == "pacs: over 2 tasks"
    assert found.notes[0] == "Left out, as no run of it finished: pacs: photo → cartoon."


def test_pairs_are_seeds_that_finished_every_task(table: ArmTable) -> None:
    better = table.cells["better", "target/test/accuracy"]
    assert better.comparison is not None
    assert better.comparison.difference.n == SEEDS
    assert better.comparison.difference.mean == pytest.approx(0.1)
    assert better.comparison.p == 2 / 2**SEEDS
    assert better.p_holm == 2 * 2 / 2**SEEDS
    assert better.better is None, "four seeds cannot mark anything"
    assert any("needed for 2 arms" in note for note in table.notes)
    assert table.cells["partly", "target/test/accuracy"].comparison is None


def test_a_seed_without_a_task_is_in_neither_mean_nor_difference(tmp_path: Path) -> None:
    for target, shift in TASKS.items():
        for seed in range(3):
            write_run(tmp_path / target / "p", "base", seed, 0.5 + shift, **on(target))
            lost = (target, seed) == ("art", 2)
            value = 0.6 + shift + 0.01 * seed
            status = "failed" if lost else "finished"
            write_run(tmp_path / target / "p", "arm", seed, value, **on(target, status=status))
    (table,) = overall(read_records([tmp_path]), "base")
    cell = table.cells["arm", "target/test/accuracy"]
    assert cell.comparison is not None
    assert (cell.value.n, cell.comparison.difference.n) == (2, 2)
    assert cell.comparison.difference.mean == pytest.approx(0.105)
    assert [row[-1] for row in table.rows() if row[0] == "arm"] == ["1.000"], "no n of tasks"


def test_tasks_that_share_a_seeds_effect_do_not_count_as_pairs(tmp_path: Path) -> None:
    """Nothing differs but a draw of each seed and arm, as large as the noise, which all tasks of the seed share."""
    rng = np.random.default_rng(0)
    inside, small, repeats, seeds = 0, 0, 300, 6
    for _ in range(repeats):
        shared = rng.normal(0, 0.01, (2, seeds))
        rows = [
            {"arm": arm, "seed": seed, "score": 0.5 + shared[a, seed] + rng.normal(0, 0.01), "task": task}
            for task in range(8) for a, arm in enumerate(("base", "arm")) for seed in range(seeds)
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        tasks = {str(task): some for task, some in frame.groupby("task")}
        comparison = _column(tasks, ["base", "arm"], "score", "base")["arm"].comparison
        assert comparison is not None
        inside += abs(comparison.difference.mean) <= comparison.difference.half
        small += comparison.p < 0.05
    assert 0.91 <= inside / repeats <= 0.98
    assert small / repeats <= 0.08


def test_ranks_are_averaged_over_tasks_that_all_arms_finished(table: ArmTable) -> None:
    assert table.metrics[-1] == RANK
    ranks = {arm: table.cells[arm, RANK].value.mean for arm in ("base", "better", "mixed")}
    # sketch: better 1, mixed 2, base 3; cartoon: mixed 1, better 2, base 3; art: better 1, base 2, mixed 3
    assert ranks == pytest.approx({"base": 8 / 3, "better": 4 / 3, "mixed": 2.0})
    assert table.cells["partly", RANK].value.n == 0


def test_rank_one_is_the_smallest_error(tmp_path: Path) -> None:
    for target in ("a", "b"):
        for arm, error in (("good", 1.0), ("bad", 2.0)):
            fields = on(target, metrics={"target/test/mae": error}, primary={"target": "mae"})
            write_run(tmp_path / target / "p", arm, 0, **fields)
    (table,) = overall(read_records([tmp_path]))
    assert [table.cells[arm, RANK].value.mean for arm in ("good", "bad")] == [1.0, 2.0]


def test_one_task_has_no_such_table(tmp_path: Path) -> None:
    write_run(tmp_path / "p", "base", 0)
    assert overall(read_records([tmp_path]), "base") == []


def test_page_shows_it_first(tmp_path: Path, table: ArmTable) -> None:
    html = write_page([tmp_path], tmp_path / "page.html", baseline="base").read_text()
    assert 0 < html.index("<h2>pacs: over 3 tasks</h2>") < html.index("<h2>pacs: photo → art</h2>")
    assert "averaged over the tasks of a seed" in html
