"""Values of many rows in a pair of files that several processes may read and write at once."""

from __future__ import annotations

import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Table"]

Ints = NDArray[np.int64]


class Table:
    """A slot for each row: ``PATH.values`` holds the values, ``PATH.sums`` a checksum each, 0 where there is none.

    Slots lie where they lie from the start (the files are sparse), so nothing is shared but the files, and no lock is
    needed: a value is written first and its checksum after it, and a value counts only where both agree. Killed
    writers, torn pages and damaged files leave rows that are computed again. Two processes that write one slot write
    the same row; which of them is last does not matter.

    Values are written by system calls, so a full disk is an OSError, and read through a memory map.

    Args:
        path: without its suffixes; its folder is made.
        offsets: [n + 1] where each slot starts and ends, in units (1 a row, or 1 a token).
        unit: numbers in a unit.
        dtype: of a number.

    Raises:
        OSError: the files cannot be made.
    """

    def __init__(self, path: Path, offsets: Ints, unit: int, dtype: np.dtype[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.offsets, self.unit, self.dtype = offsets, unit, dtype
        rows, units = len(offsets) - 1, int(offsets[-1])
        self._width = unit * dtype.itemsize
        values, sums = Path(f"{path}.values"), Path(f"{path}.sums")
        self._values_file = _sized(self, values, units * self._width)
        self._sums_file = _sized(self, sums, rows * 4)
        self._values = np.memmap(values, dtype, "r", shape=(units, unit))
        self._sums = np.memmap(sums, np.uint32, "r", shape=(rows,))
        self._verified = np.zeros(rows, bool)
        self._even = bool((np.diff(offsets) == 1).all())

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def marked(self) -> NDArray[np.bool_]:
        """[n] rows that have a checksum: stored, if their value is whole."""
        found: NDArray[np.bool_] = np.asarray(self._sums) != 0
        return found

    def size(self, slots: Ints) -> int:
        """Bytes that these rows take."""
        return int((self.offsets[slots + 1] - self.offsets[slots]).sum()) * self._width

    def known(self, slots: Ints) -> NDArray[np.bool_]:
        """[m] whether each row is stored and whole; a row is checked the first time this process asks for it."""
        out = self._verified[slots]
        if not out.all():
            for i in np.flatnonzero(~out):
                slot = int(slots[i])
                if self._sums[slot]:
                    out[i] = self._verified[slot] = self._sums[slot] == _checksum(self._part(slot), slot)
        return out

    def read(self, slots: Ints) -> NDArray[Any]:
        """Values of rows that are known, one after the other: [units, unit]."""
        if self._even:
            return np.asarray(self._values[slots])
        return np.concatenate([self._part(int(slot)) for slot in slots])

    def write(self, slots: Ints, values: NDArray[Any]) -> None:
        """Store the values [units, unit] of rows, laid one after the other.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        start = 0
        for slot in map(int, slots):
            stop = start + int(self.offsets[slot + 1] - self.offsets[slot])
            part = np.ascontiguousarray(values[start:stop], self.dtype)
            start = stop
            if self._sums[slot] and self.known(np.array([slot]))[0]:
                continue  # another process was first
            _write(self._values_file, part.tobytes(), int(self.offsets[slot]) * self._width)
            _write(self._sums_file, np.uint32(_checksum(part, slot)).tobytes(), slot * 4)
            self._verified[slot] = True

    def _part(self, slot: int) -> NDArray[Any]:
        return np.asarray(self._values[self.offsets[slot] : self.offsets[slot + 1]])


def _checksum(part: NDArray[Any], slot: int) -> int:
    """Checksum of a row's bytes and its place; never 0."""
    return zlib.crc32(np.ascontiguousarray(part).data.cast("B"), slot + 1) or 1


def _sized(owner: Table, path: Path, size: int) -> int:
    """Open a file of at least ``size`` bytes for reading and writing; it is closed with its table."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    weakref.finalize(owner, os.close, file)
    if os.fstat(file).st_size < size:
        os.ftruncate(file, size)
    return file


def _write(file: int, data: bytes, at: int) -> None:
    while data:
        done = os.pwrite(file, data, at)
        data, at = data[done:], at + done
