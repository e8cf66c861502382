"""``on_error: quarantine``: bad rows are dropped and listed, and a later leg drops the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import text_domains

from crossft.data import DomainData


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return text_domains(tmp_path, each=20)


def edit(root: Path, change: Callable[[int, str], str], name: str = "books") -> list[str]:
    """Change the data lines of a CSV of 40 rows by number (from 1); the new lines."""
    header, *lines = (root / f"{name}.csv").read_text().splitlines()
    changed = [header, *(change(i, line) for i, line in enumerate(lines, 1))]
    (root / f"{name}.csv").write_text("\n".join(changed) + "\n")
    return changed


def split_column(root: Path, odd: dict[int, str], twin: bool = False) -> None:
    """Add a split column: train, dev and test by turns of two rows; ``odd`` names other values by row.

    ``twin`` adds a test row with the content of the first, a training row.
    """
    lines = edit(root, lambda i, line: f"{line},{odd.get(i, ('train', 'dev', 'test')[(i - 1) // 2 % 3])}")
    lines[0] += ",split"
    lines += [lines[1].removesuffix("train") + "test"] if twin else []
    (root / "books.csv").write_text("\n".join(lines) + "\n")


def allowing(root: Path) -> DomainData:
    return DomainData(root, target="books", on_error="quarantine", max_bad=0.1)


def inherits(root: Path, data: DomainData) -> bool:
    child = DomainData(root, target="books")
    child.use_manifest(data.split_manifest())
    return child.split_manifest() == data.split_manifest()


def listed(data: DomainData) -> list[tuple[str, str]]:
    assert {row["domain"] for row in data.quarantined} == {"books"}
    return sorted((row["where"].rsplit(": ", 1)[1], row["reason"]) for row in data.quarantined)


def test_bad_rows_are_dropped_and_listed(root: Path) -> None:
    edit(root, lambda i, line: {3: ",negative", 4: "hello,"}.get(i, line))
    data = allowing(root)
    data.prepare()
    assert listed(data) == [("row 3", "empty text"), ("row 4", "no label")]
    assert len(data.prepared[0].ids) == 38


def test_the_training_copy_of_a_test_row_is_dropped(root: Path) -> None:
    split_column(root, {}, twin=True)
    data = allowing(root)
    assert (data.describe()[0]["train"], data.describe()[0]["test"]) == (13, 13), "14 and 13 of 41, a test twin of one"
    ((row, reason),) = listed(data)
    assert row == "row 1"
    assert reason.endswith("row 41 (test) in split train")
    assert inherits(root, data)


def test_rows_without_a_known_split_are_dropped(root: Path) -> None:
    split_column(root, {1: "", 2: "fold1"})
    data = allowing(root)
    assert data.describe()[0]["train"] == 12
    (first, nothing), (second, unknown) = listed(data)
    assert (first, second) == ("row 1", "row 2")
    assert nothing.startswith("names no split")
    assert unknown.startswith("unknown split 'fold1', allowed: train")
    assert inherits(root, data)
    assert len(DomainData(root, target="books", split="stratified").prepared[0].ids) == 40


def test_labels_of_an_unlabeled_domain_make_no_row_bad(root: Path) -> None:
    edit(root, lambda i, line: line.rsplit(",", 1)[0] + ",", "kitchen")
    data = DomainData(root, "books", "kitchen", target_labels="none", train_on=["source", "target"])
    assert data.describe()[1]["test_labels"] == 0
