"""What a reader returns: the rows of one domain, before any check, split or transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["Columns", "Concat", "Modality", "Subsequence", "Table"]

Modality = Literal["image", "text"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns a reader looks for; None means: detect.

    Attributes:
        text: text column (detected: text, sentence, review, content, premise, sentence1, question).
        pair: second text of a pair (detected: text_pair, hypothesis, sentence2).
        label: label column (detected: label, labels, class, target, category, score, rating).
        image: image path column (detected: image, path, file, filename, image_path).
        split: column that names each row's split (detected: split).
        id: column that names rows in messages (never detected).
        group: column whose equal values never cross splits (never detected).
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    image: str | None = None
    split: str | None = None
    id: str | None = None
    group: str | None = None


@dataclass
class Table:
    """The rows of one domain as a reader finds them, in any order.

    Attributes:
        modality: ``image`` or ``text``.
        inputs: one entry a row: a path, PIL image, array or tensor for images; a string or a pair of strings for text.
            May load lazily (any sequence).
        labels: raw labels (str, number, list of str, None), or None where the domain has no labels at all.
        where: file and row of each entry, for messages.
        splits: the given split of each row (None where the row names none; any name but train, val and test makes a
            bad row), or None where no row has one.
        groups: the group of each row, or None.
        problems: row -> why the reader could not read it.
    """

    modality: Modality
    inputs: Sequence[Any]
    labels: list[Any] | None
    where: list[str]
    splits: list[str | None] | None = None
    groups: list[str] | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.where)

    def keep(self, rows: Sequence[int]) -> Table:
        """The table of these rows, in this order; their problems are settled by then."""
        return Table(
            self.modality,
            [self.inputs[i] for i in rows] if isinstance(self.inputs, list) else Subsequence(self.inputs, list(rows)),
            None if self.labels is None else [self.labels[i] for i in rows],
            [self.where[i] for i in rows],
            None if self.splits is None else [self.splits[i] for i in rows],
            None if self.groups is None else [self.groups[i] for i in rows],
        )


@dataclass
class Subsequence(Sequence[Any]):
    """Chosen entries of a lazy sequence, still lazy."""

    items: Sequence[Any]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.rows[index]]


class Concat(Sequence[Any]):
    """Several sequences, one after the other, still lazy."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]
