"""Listing and removing stored prefixes, as ``crossft cache`` does."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from crossft.errors import ConfigError
from crossft.runs import StoredPrefix, allocated, prefix_folder, remove_prefixes, stored_prefixes, write_json


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two prefixes, and one that a killed run left without a description."""
    for key, stage, sums, used in (("aa11", "features", (1, 0, 7), 10), ("ab22", "blocks.6", (0, 0, 9), 20)):
        write_json(tmp_path / key / "about.json", {"backbone": "net", "stage": stage, "shape": [4]})
        (tmp_path / key / "photo-1.sums").write_bytes(struct.pack("3I", *sums))
        (tmp_path / key / "photo-1.values").write_bytes(b"\1" * 100_000)
        os.utime(tmp_path / key / "about.json", (used, used))
    (tmp_path / "cc33").mkdir()
    (tmp_path / "cc33" / "x.sums").write_bytes(b"\1\0\0")  # torn
    return tmp_path


def test_the_list_shows_the_last_used_first(root: Path) -> None:
    listed = stored_prefixes(root)
    assert [(p.key, p.backbone, p.stage, p.rows, p.used) for p in listed] == [
        ("ab22", "net", "blocks.6", 1, 20),
        ("aa11", "net", "features", 2, 10),
        ("cc33", "?", "?", 0, 0),
    ]
    assert all(isinstance(p, StoredPrefix) for p in listed)
    assert 100_000 <= listed[0].bytes < 150_000
    assert allocated(root) >= listed[0].bytes + listed[1].bytes
    assert stored_prefixes(root / "nothing") == []
    assert allocated(root / "nothing") == 0


def test_sparse_files_count_what_they_take(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 30)
    assert allocated(tmp_path) < 1 << 20


def test_prefixes_are_removed_by_key_or_its_beginning(root: Path) -> None:
    assert [p.key for p in remove_prefixes(["aa", "cc33", "aa11"], root)] == ["aa11", "cc33"]
    assert [p.key for p in stored_prefixes(root)] == ["ab22"]


@pytest.mark.parametrize("keys", [["a"], ["ab22", "zz"], [""]])
def test_a_key_that_is_not_one_removes_nothing(root: Path, keys: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"names \d cached prefixes, not one"):
        remove_prefixes(keys, root)
    assert len(stored_prefixes(root)) == 3


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path))
    assert prefix_folder() == tmp_path / "prefix"
    monkeypatch.delenv("CROSSFT_CACHE")
    assert prefix_folder() == Path.home() / ".cache" / "crossft" / "prefix"
