"""A sweep over the stand-ins of the command line; as a program, one that the tests kill.

python sweeping.py FILE SLOTS [FLAGS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from crossft.sweeps.file import read_sweep
from crossft.sweeps.local import Local, Outcome
from crossft.sweeps.plan import Plan, Run, make_plan
from crossft.sweeps.search import Search, SearchPlan, make_search

HERE = Path(__file__).resolve().parent
RESOLVE = [sys.executable, str(HERE / "fake_resolve.py")]
PROGRAM = [sys.executable, str(HERE / "fake_cli.py")]


class Notes:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, bool]] = []
        self.over: list[Outcome] = []

    def started(self, run: Run, slot: int, resumed: bool) -> None:
        self.begun.append((run.name, resumed))

    def ended(self, outcome: Outcome, slot: int | None) -> None:
        self.over.append(outcome)

    def tick(self, active: Sequence[tuple[int, Run]]) -> None:
        pass


def write_sweep(folder: Path, **keys: Any) -> Path:
    """A sweep file whose runs lie in ``folder/runs/small``."""
    (folder / "base.yaml").write_text("methods: {}\n")
    parameters = {"run.root": {"value": str(folder / "runs")}, **keys.pop("parameters", {})}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"config": "base.yaml", "parameters": parameters, **keys}, sort_keys=False))
    return file


def planned(file: Path, *flags: str) -> Plan:
    return make_plan(read_sweep(file, flags), program=RESOLVE)


def sweep(plan: Plan, slots: int = 2, **options: Any) -> tuple[list[Outcome], Notes]:
    notes = Notes()
    return Local(plan, slots, program=PROGRAM, **options).run(notes), notes


def search(file: Path, slots: int = 1, *flags: str, **options: Any) -> tuple[SearchPlan, Notes]:
    """Search to the end; the plan, and what was seen."""
    plan = make_search(read_sweep(file, flags), program=RESOLVE)
    notes, supply = Notes(), Search(plan, options.get("retry", False))
    empty = Plan(plan.sweep, (), {}, plan.root)
    try:
        Local(empty, slots, program=PROGRAM, supply=supply, **options).run(notes)
    finally:
        supply.close()
    return plan, notes


def starts(plan: Plan | SearchPlan, word: str = "") -> list[str]:
    """Lines of what was started, in order: command, folder, threads, process, parent; or leg, folder, time."""
    file = plan.root / "starts.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line for line in lines if line.startswith(word)]


if __name__ == "__main__":
    if read_sweep(Path(sys.argv[1])).method == "bayes":
        search(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    else:
        sweep(planned(Path(sys.argv[1]), *sys.argv[3:]), int(sys.argv[2]))
