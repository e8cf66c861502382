"""Values of one prefix for all rows of a run's data: one table a domain and view, in one folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossft.callbacks.caching.table import Ints, Table
from crossft.errors import RunError
from crossft.runs import allocated, read_json, write_json

__all__ = ["Budget", "Form", "Store"]


@dataclass
class Budget:
    """Bytes that all stored prefixes under a folder may take.

    Attributes:
        root: the folder.
        limit: at most so many bytes.
    """

    root: Path
    limit: int

    def __post_init__(self) -> None:
        self.exceeded = False
        self._used = self._measured = allocated(self.root)

    def take(self, size: int) -> bool:
        """Whether ``size`` more bytes fit; they count as used then."""
        if self._used - self._measured > self.limit // 50:  # other processes write too
            self._used = self._measured = allocated(self.root)
        if self._used + size > self.limit:
            self.exceeded = True
            return False
        self._used += size
        return True


@dataclass(frozen=True)
class Form:
    """What the values of one prefix look like.

    Attributes:
        shape: of a row's value, or of a token's where ``tokens``.
        tokens: whether a row's value has as many parts as the row has tokens.
        kind: the torch dtype that the prefix returns.
    """

    shape: tuple[int, ...]
    tokens: bool
    kind: str


@dataclass
class _Part:
    """Positions of a batch that lie in one table, and their slots."""

    table: Table
    view: int
    positions: Ints
    slots: Ints
    start: int


class Store:
    """Values of one prefix, found by the keys of a batch.

    Args:
        folder: of this prefix.
        rows: the data set (`crossft.data.dataset.Rows`).
        starts: [domains + 1] dataset row where each domain starts.
        names: of the domains.
        storage: ``float32`` or ``bfloat16``.
        budget: of all prefixes together.
        about: what `crossft.runs.stored_prefixes` tells of the prefix.
    """

    def __init__(
        self,
        folder: Path,
        rows: Any,
        starts: Ints,
        names: Sequence[str],
        storage: str,
        budget: Budget,
        about: dict[str, Any],
    ) -> None:
        self.folder, self.budget = folder, budget
        self._rows, self._starts, self._names = rows, starts, names
        self._storage: torch.dtype = getattr(torch, storage)
        self._about = about
        self._tables: dict[tuple[int, int], Table] = {}
        self._placed: tuple[Any, Ints, Ints, Ints] = (None, starts, starts, starts)
        self.problem: str | None = None
        self.form = self._known_form()

    def _known_form(self) -> Form | None:
        try:
            about = read_json(self.folder / "about.json")
            os.utime(self.folder / "about.json")
            return Form(tuple(map(int, about["shape"])), bool(about["tokens"]), str(about["kind"]))
        except (RunError, OSError, KeyError, TypeError, ValueError):
            return None

    # Rows and tables

    def _table(self, domain: int, view: int) -> Table:
        if (domain, view) not in self._tables:
            assert self.form is not None
            part = slice(int(self._starts[domain]), int(self._starts[domain + 1]))
            if self.form.tokens:
                offsets = np.concatenate([[0], np.cumsum(self._rows.tokens.lengths[part])])
            else:
                offsets = np.arange(part.stop - part.start + 1)
            dtype = np.dtype(np.float32 if self._storage == torch.float32 else np.uint16)
            table = Table(self._path(domain, view), offsets, math.prod(self.form.shape), dtype)
            self._tables[domain, view] = table
        return self._tables[domain, view]

    def _path(self, domain: int, view: int) -> Path:
        part = slice(int(self._starts[domain]), int(self._starts[domain + 1]))
        name = re.sub(r"\W+", "_", self._names[domain])[:40]
        return self.folder / f"{name}-{self._rows.content(part, view)}"

    def _parts(self, keys: Sequence[Any], only: Ints | None = None) -> list[_Part]:
        """The keys (or those at positions ``only``) by table."""
        if self._placed[0] is not keys:
            rows = np.array([key.row for key in keys], np.int64)
            views = np.array([self._rows.view_of(key) for key in keys], np.int64)
            self._placed = (keys, rows, views, np.searchsorted(self._starts, rows, side="right") - 1)
        _, rows, views, domains = self._placed
        positions = np.arange(len(keys))
        if only is not None and len(only) < len(keys):
            positions, rows, views, domains = only, rows[only], views[only], domains[only]
        out = []
        for domain, view in sorted({*zip(domains.tolist(), views.tolist())}):
            mine = (domains == domain) & (views == view)
            start = int(self._starts[domain])
            out.append(_Part(self._table(domain, view), view, positions[mine], rows[mine] - start, start))
        return out

    def marks(self, postponed: Tensor) -> None:
        """Set ``postponed`` [views, rows] to 1 where a value is stored, to 0 elsewhere."""
        postponed.zero_()
        if self.form is None:
            return
        for domain in range(len(self._names)):
            for view in range(len(postponed)):
                if (domain, view) in self._tables or Path(f"{self._path(domain, view)}.sums").exists():
                    marked = torch.from_numpy(self._table(domain, view).marked)
                    postponed[view, int(self._starts[domain]) : int(self._starts[domain + 1])] = marked

    # Values

    def known(self, keys: Sequence[Any]) -> NDArray[np.bool_]:
        """[b] whether the value of each key is stored."""
        out = np.zeros(len(keys), bool)
        if self.form is not None:
            for part in self._parts(keys):
                out[part.positions] = part.table.known(part.slots)
        return out

    def read(self, keys: Sequence[Any], only: Ints) -> Tensor:
        """Values of keys that are known, of the positions ``only`` (ascending): [m, ...], or [tokens of them, ...]."""
        assert self.form is not None
        parts = self._parts(keys, only)
        if len(parts) == 1:
            flat = parts[0].table.read(parts[0].slots)
        elif not self.form.tokens:
            flat = np.empty((len(only), math.prod(self.form.shape)), parts[0].table.dtype)
            for part in parts:
                flat[np.searchsorted(only, part.positions)] = part.table.read(part.slots)
        else:
            pieces: list[Any] = [None] * len(only)
            for part in parts:
                for position, slot in zip(np.searchsorted(only, part.positions), part.slots):
                    pieces[position] = part.table.read(slot[None])
            flat = np.concatenate(pieces)
        values = torch.from_numpy(flat)
        if self._storage != torch.float32:
            values = values.view(self._storage)
        return values.to(getattr(torch, self.form.kind)).reshape(-1, *self.form.shape)

    def rounded(self, values: Tensor) -> Tensor:
        """Values as they are read back."""
        return values.to(self._storage).to(values.dtype)

    def write(self, keys: Sequence[Any], only: Ints, values: Tensor, postponed: Tensor | None) -> None:
        """Store the values of the positions ``only``, laid as `read` gives them; sets ``postponed`` for them.

        What the budget or the disk has no room for is left out, and ``problem`` says why.
        """
        assert self.form is not None
        flat = values.detach().to(self._storage).cpu().reshape(-1, math.prod(self.form.shape))
        numbers = (flat if self._storage == torch.float32 else flat.view(torch.uint16)).numpy()
        try:
            for part in self._parts(keys, only):
                inside = np.searchsorted(only, part.positions)
                if not self.budget.take(part.table.size(part.slots)):
                    continue
                part.table.write(part.slots, self._units(numbers, keys, only, inside))
                if postponed is not None:
                    postponed[part.view, torch.from_numpy(part.slots + part.start)] = 1
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"

    def _units(self, numbers: NDArray[Any], keys: Sequence[Any], only: Ints, inside: Ints) -> NDArray[Any]:
        """The units of some of the rows ``only``, whose units lie one after the other."""
        assert self.form is not None
        if not self.form.tokens:
            return numbers[inside]
        lengths = self._rows.tokens.lengths[[keys[i].row for i in only]]
        ends = np.cumsum(lengths)
        return np.concatenate([numbers[ends[i] - lengths[i] : ends[i]] for i in inside])

    def shape(self, values: Tensor, tokens: bool) -> None:
        """Learn from values, one after the other, what they look like."""
        kind = str(values.dtype).removeprefix("torch.")
        form = Form(tuple(values.shape[1:]), tokens, kind)
        if form == self.form:
            return
        self.form = form
        self._tables.clear()
        try:
            write_json(self.folder / "about.json", {**self._about, **asdict(self.form)})
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"
