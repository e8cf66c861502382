"""``metrics.csv``: what was measured while training, one value a line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

from crossft.errors import RunError
from crossft.runs.files import write_atomic

__all__ = ["MetricRow", "MetricsCsv", "read_metrics"]


class MetricRow(NamedTuple):
    """One line of ``metrics.csv``: ``step`` counts optimizer steps; ``value`` is NaN where undefined."""

    step: int
    epoch: int
    name: str
    value: float


_HEADER = ",".join(MetricRow._fields) + "\n"


class MetricsCsv:
    """Appends to ``metrics.csv``: one line a value, so that new names need no rewriting and a kill costs one line.

    A half line that a kill left at the end is cut off on opening. Use it in one process only.

    Args:
        path: the file; created with its header when missing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def _opened(self) -> TextIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(self.path)
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self._file.tell() == 0:
                self._file.write(_HEADER)
        return self._file

    def append(self, step: int, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """Write one line for each metric, in one write, and flush; None is written as NaN."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        for name, value in metrics.items():
            writer.writerow((step, epoch, name, "nan" if value is None else repr(float(value))))
        file = self._opened()
        file.write(text.getvalue())
        file.flush()

    def truncate(self, step: int) -> None:
        """Drop the rows after optimizer step ``step``, as a run that resumes there writes them again."""
        self.close()
        if self.path.exists():
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(row for row in _rows(self.path) if row.step <= step)
            write_atomic(self.path, _HEADER + text.getvalue())

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_half_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _rows(path: Path) -> Iterator[MetricRow]:
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a half last line was never finished
    for number, fields in enumerate(csv.reader(io.StringIO(whole)), 1):
        if number == 1 or not fields:
            continue
        try:
            step, epoch, name, value = fields
            yield MetricRow(int(step), int(epoch), name, float(value))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not step,epoch,name,value ({error}); remove the line") from error


def read_metrics(path: Path | str) -> list[MetricRow]:
    """Read ``metrics.csv`` in order of writing; of two rows with one step and name the later counts.

    A half last line, as a kill leaves it, is left out.

    Raises:
        RunError: the file is missing, or a line before the last is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; the run has logged nothing yet, or this is not its folder")
    latest: dict[tuple[int, str], MetricRow] = {}
    for row in _rows(path):
        latest.pop((row.step, row.name), None)
        latest[row.step, row.name] = row
    return list(latest.values())
