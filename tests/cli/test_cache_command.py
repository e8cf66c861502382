"""``crossft cache ls|rm``."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from crossft.cli import main
from crossft.runs import prefix_folder, stored_prefixes, write_json


@pytest.fixture(autouse=True)
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path))
    for key, days in (("aa11", 0), ("ab22", 3), ("bb33", 30)):
        folder = prefix_folder() / key
        write_json(folder / "about.json", {"backbone": "packaged:minilm", "stage": "layer.4"})
        (folder / "books.sums").write_bytes(struct.pack("3I", 5, 0, 6))
        used = time.time() - days * 86_400 - 60
        os.utime(folder / "about.json", (used, used))


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "backbone", "enters", "rows", "size", "used"]
    assert [line.split()[0] for line in lines[1:4]] == ["aa11", "ab22", "bb33"]
    assert lines[1].split()[1:4] == ["packaged:minilm", "layer.4", "2"]
    assert lines[4].startswith("3 prefixes, ")


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["aa"], ["ab22", "bb33"]),
        (["ab22", "bb"], ["aa11"]),
        (["--unused", "2"], ["aa11"]),
        (["--unused", "60"], ["aa11", "ab22", "bb33"]),
        (["--all"], []),
    ],
)
def test_removing(arguments: list[str], left: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "rm", *arguments]) == 0
    assert [p.key for p in stored_prefixes()] == left
    assert f"removed {3 - len(left)} of 3 prefixes" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["a"], ["zz"]])
def test_what_names_nothing_removes_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "rm", *arguments]) == 2
    assert len(stored_prefixes()) == 3
    assert "crossft: error: " in capsys.readouterr().err
