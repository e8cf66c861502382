"""Every joint of the design has tests, and those that docs/joints.md names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "joints.md").read_text()


def test_named_tests_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 28
    missing = []
    for file, name in named:
        path = ROOT / file
        functions = (
            {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
            if path.is_file()
            else set()
        )
        if name not in functions:
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_joint_is_listed_with_a_test() -> None:
    rows = re.findall(r"^\| (\d+) [^|]+\|[^|]+\| (.*) \|$", PAGE, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 15))
    assert all("::test_" in tests for _, tests in rows)
