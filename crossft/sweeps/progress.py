"""What a running sweep shows: bars on a terminal, one line an event elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from crossft.sweeps.local import Outcome
from crossft.sweeps.plan import Run
from crossft.sweeps.state import State, tail

__all__ = ["SweepProgress"]

_EPOCH = re.compile(r"^epoch (\d+)/(\d+)\b")
_EVERY = 0.5


class SweepProgress:
    """A ``Watcher``: one bar for all runs and one for each that trains, by its epochs.

    Args:
        total: number of runs.
        console: where to; default: the terminal's standard output.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[said]}"), console=self.console)
        self._all = self._bars.add_task("runs", total=total, said="")
        self._slots: dict[int, TaskID] = {}
        self._failed = 0
        self._looked = 0.0

    def __enter__(self) -> SweepProgress:
        """Show the bars, on a terminal."""
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the bars as they are."""
        if self.console.is_terminal:
            self._bars.stop()

    def started(self, run: Run, slot: int, resumed: bool) -> None:
        """Add a bar, or print a line."""
        if self.console.is_terminal:
            self._slots[slot] = self._bars.add_task(escape(run.name), total=None, said="starting")
        else:
            self.console.print(f"{'resumed' if resumed else 'started'}   {run.name}", markup=False)

    def ended(self, outcome: Outcome, slot: int | None) -> None:
        """Count it, and say so; runs that were finished before are counted only."""
        if slot in self._slots:
            self._bars.remove_task(self._slots.pop(slot))
        self._failed += outcome.state is State.FAILED
        self._bars.update(self._all, advance=1, said=f"{self._failed} failed" if self._failed else "")
        if outcome.state is State.FINISHED and slot is None:
            return
        word = "stopped" if outcome.state is State.UNFINISHED else outcome.state.value
        after = outcome.reason or f"{outcome.seconds:.0f} s"
        self.console.print(f"{word:<9} {outcome.run.name}: {after}", markup=False)

    def tick(self, active: Sequence[tuple[int, Run]]) -> None:
        """Show the last line of each log."""
        if not self.console.is_terminal or time.monotonic() - self._looked < _EVERY:
            return
        self._looked = time.monotonic()
        for slot, run in active:
            said = tail(run.log, lines=1)
            epoch = _EPOCH.match(said)
            done, total = (int(epoch.group(1)), int(epoch.group(2))) if epoch else (None, None)
            self._bars.update(self._slots[slot], completed=done, total=total, said=escape(said[:60]))
