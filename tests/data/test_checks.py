from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import image_domains

from crossft.data import checks
from crossft.data.checks import content_of
from crossft.data.table import Table


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / "cache"))
    return sorted((image_domains(tmp_path / "data", domains=("photo",), each=5)).rglob("*.png"))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Paths that were read, as they are read."""
    seen: list[str] = []
    real = checks._read

    def spy(path: str, decode: bool) -> checks.Seen:
        seen.append(path)
        return real(path, decode)

    monkeypatch.setattr(checks, "_read", spy)
    return seen


def table(files: list[Path]) -> Table:
    return Table("image", list(files), None, [str(f) for f in files])


def test_only_changed_files_are_read_again(files, reads):
    first = content_of(table(files), "here", "changed")
    assert sorted(reads) == [str(f) for f in files]
    reads.clear()
    assert content_of(table(files), "here", "changed") == first
    assert reads == []
    Image.new("RGB", (3, 3)).save(files[2])
    hashes, problems = content_of(table(files), "here", "changed")
    assert reads == [str(files[2])]
    assert [a != b for a, b in zip(hashes, first[0])] == [f == files[2] for f in files]
    assert not problems
    reads.clear()
    content_of(table(files), "here", "full")
    assert len(reads) == 10
    reads.clear()
    content_of(table(files), "elsewhere", "changed")
    assert len(reads) == 10, "another place, another manifest"


def test_off_trusts_the_manifest_and_decodes_nothing(files, reads):
    files[0].write_bytes(b"no image")
    hashes, problems = content_of(table(files), "here", "off")
    assert not problems
    assert len(set(hashes)) == 10
    assert content_of(table(files), "here", "changed")[1].keys() == {0}, "what was not decoded is not known to be good"
    reads.clear()
    files[1].write_bytes(b"worse")
    assert content_of(table(files), "here", "off")[1].keys() == {0}
    assert reads == []


def test_a_bad_file_stays_bad_until_it_changes(files):
    good = files[4].read_bytes()
    files[4].write_bytes(good[:60])
    for _ in range(2):
        assert "unreadable image" in content_of(table(files), "here", "changed")[1][4]
    files[4].write_bytes(good)
    os.utime(files[4], ns=(1, 1))
    assert content_of(table(files), "here", "changed")[1] == {}


def test_the_manifest_lies_outside_the_data_and_survives_damage(files, tmp_path, reads):
    before = sorted(tmp_path.glob("data/**/*"))
    content_of(table(files), "here", "changed")
    assert sorted(tmp_path.glob("data/**/*")) == before
    (manifest,) = (tmp_path / "cache").rglob("*.parquet")
    manifest.write_bytes(b"PAR1 half a file")
    reads.clear()
    content_of(table(files), "here", "changed")
    assert len(reads) == 10
    shutil.rmtree(tmp_path / "cache")
    assert len(content_of(table(files), "here", "off")[0]) == 10


def test_equal_pixels_of_arrays_share_a_hash_and_other_types_are_refused():
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    values = [array, array.copy(), array[::-1], Image.fromarray(array), "text"]
    hashes, problems = content_of(Table("image", values, None, list("abcde")), "x", "changed")
    assert hashes[0] == hashes[1] != hashes[2]
    assert problems == {4: "a str is not an image"}


def test_progress_is_shown_where_reading_takes_long(files, monkeypatch, capsys):
    monkeypatch.setattr(checks, "SLOW", 5)
    content_of(table(files), "root/photo", "full")
    assert "Checking photo" in capsys.readouterr().err


def test_a_file_that_vanishes_is_named(files, tmp_path):
    rows = table([*files, tmp_path / "gone.png"])
    assert content_of(rows, "here", "changed")[1] == {10: "no readable file: No such file or directory"}
