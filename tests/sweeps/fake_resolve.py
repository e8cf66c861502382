"""Stands in for ``crossft.cli.resolve``: the flags are the config, and nothing is imported for it."""

from __future__ import annotations

import json
import sys
from typing import Any

from crossft.runs import config_hash


def resolve(line: list[str]) -> dict[str, Any]:
    flags: dict[str, Any] = dict(word[2:].split("=", 1) for word in line)
    if flags.get("bad"):
        return {"error": f"bad={flags['bad']} is refused"}
    root = flags.pop("run.root", "runs")
    flags.pop("config", None)
    hashed = config_hash(flags, {"arm", "experiment"})
    return {
        "config": {**flags, "run": {"root": root}},
        "hash": hashed,
        "source": flags.get("fake.leg"),
        "source_seed": 0,
    }


if __name__ == "__main__":
    json.dump([resolve(line) for line in json.load(sys.stdin)["lines"]], sys.stdout)
