"""The files of a table: whole rows are found, anything else is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossft.callbacks.caching.table import Table

FLOAT = np.dtype(np.float32)
EVEN = np.arange(6)
RAGGED = np.array([0, 3, 4, 9, 9 + 2, 15])


def filled(path: Path, offsets: np.ndarray, slots: list[int]) -> tuple[Table, np.ndarray]:
    """A table whose unit u holds u, u + 0.5, ... in the given slots."""
    table = Table(path, offsets, 4, FLOAT)
    values = np.arange(offsets[-1], dtype=np.float32)[:, None] + np.arange(4, dtype=np.float32) / 8
    chosen = np.array(slots)
    table.write(chosen, np.concatenate([values[offsets[s] : offsets[s + 1]] for s in slots]))
    return table, values


@pytest.mark.parametrize("offsets", [EVEN, RAGGED], ids=["even", "ragged"])
def test_rows_come_back_in_any_order_and_in_another_process(tmp_path: Path, offsets: np.ndarray) -> None:
    table, values = filled(tmp_path / "a", offsets, [3, 0, 1])
    for reader in (table, Table(tmp_path / "a", offsets, 4, FLOAT)):
        assert reader.known(np.arange(5)).tolist() == [True, True, False, True, False]
        assert reader.marked.tolist() == [True, True, False, True, False]
        wanted = [1, 3, 0]
        expected = np.concatenate([values[offsets[s] : offsets[s + 1]] for s in wanted])
        assert np.array_equal(reader.read(np.array(wanted)), expected)
    assert table.size(np.array([0, 1])) == 16 * (offsets[2] - offsets[0])


def test_a_row_is_seen_by_a_table_that_was_open_before(tmp_path: Path) -> None:
    early = Table(tmp_path / "a", EVEN, 4, FLOAT)
    assert not early.known(np.array([2])).any()
    _, values = filled(tmp_path / "a", EVEN, [2])
    assert early.known(np.array([2])).all()
    assert np.array_equal(early.read(np.array([2])), values[2:3])


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("damage", ["value", "sum", "half", "moved", "truncated", "emptied"])
def test_a_damaged_row_is_unknown_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "a", RAGGED, [0, 1, 2, 4])
    values, sums = tmp_path / "a.values", tmp_path / "a.sums"
    if damage == "value":
        change(values, 16 * 4 + 5, b"\xff")  # slot 2 starts at unit 4
    elif damage == "sum":
        change(sums, 4 * 2, b"\x01")
    elif damage == "half":  # killed between the value and its checksum
        change(sums, 4 * 2, b"\0\0\0\0")
    elif damage == "moved":  # a whole row, in the wrong place
        raw, marks = values.read_bytes(), sums.read_bytes()
        change(values, 16 * 4, raw[:48])
        change(sums, 4 * 2, marks[:4])
    elif damage == "truncated":
        values.write_bytes(values.read_bytes()[: 16 * 6])
    else:
        values.write_bytes(b"")
    table = Table(tmp_path / "a", RAGGED, 4, FLOAT)
    lost = {"truncated": [2, 4], "emptied": [0, 1, 2, 4]}.get(damage, [2])
    assert np.flatnonzero(~table.known(np.arange(5))).tolist() == sorted({*lost, 3})
    filled(tmp_path / "a", RAGGED, lost)
    again, expected = Table(tmp_path / "a", RAGGED, 4, FLOAT), np.arange(4, 9)[:, None] + np.arange(4) / 8
    assert again.known(np.array([0, 1, 2, 4])).all()
    assert np.array_equal(again.read(np.array([2])), expected.astype(np.float32))


def test_a_row_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    table, values = filled(tmp_path / "a", EVEN, [1])
    table.write(np.array([1, 2]), np.full((2, 4), 7, np.float32))
    assert np.array_equal(table.read(np.array([1])), values[1:2])
    assert (table.read(np.array([2])) == 7).all()


def test_rows_of_zeros_are_rows(tmp_path: Path) -> None:
    table = Table(tmp_path / "a", EVEN, 4, FLOAT)
    table.write(np.array([3]), np.zeros((1, 4), np.float32))
    assert table.known(np.arange(5)).tolist() == [False, False, False, True, False]
