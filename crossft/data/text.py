"""Texts become token ids once, before training; batches are padded to their own longest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossft.types import TextSpec

__all__ = ["Tokens", "pad", "tokenize"]


@dataclass(eq=False)
class Tokens:
    """Token ids of many texts in one flat array.

    Attributes:
        ids: all token ids, int32; ``types`` the token types beside them, or None.
        starts: [n + 1] where each text starts.
        pad_id, pad_type: fill values of padding.
        left: whether padding goes before the text.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32] | None
    starts: NDArray[np.int64]
    pad_id: int
    pad_type: int = 0
    left: bool = False

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text [n]."""
        return np.diff(self.starts)

    def content(self, rows: slice) -> bytes:
        """All token ids, token types and lengths of some texts, as bytes."""
        part = slice(int(self.starts[rows.start]), int(self.starts[rows.stop]))
        types = b"" if self.types is None else self.types[part].tobytes()
        return self.ids[part].tobytes() + types + self.lengths[rows].tobytes()

    def row(self, index: int) -> dict[str, NDArray[np.int32]]:
        """The token arrays of one text."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        out = {"input_ids": self.ids[part]}
        if self.types is not None:
            out["token_type_ids"] = self.types[part]
        return out


def tokenize(texts: Sequence[Any], spec: TextSpec, max_length: int | None = None, chunk: int = 4096) -> Tokens:
    """Tokenize strings or pairs of strings, truncated to the smaller of ``max_length`` and the backbone's own limit."""
    limit = spec.max_length if max_length is None else min(max_length, spec.max_length)
    ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    types: list[NDArray[np.int32]] = []
    lengths: list[int] = [0]
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        pair = isinstance(part[0], tuple)
        first, second = ([t[0] for t in part], [t[1] for t in part]) if pair else (list(part), None)
        coded = spec.tokenizer(first, second, truncation=True, max_length=limit, padding=False)
        ids.append(np.fromiter(chain.from_iterable(coded["input_ids"]), np.int32))
        if "token_type_ids" in coded:
            types.append(np.fromiter(chain.from_iterable(coded["token_type_ids"]), np.int32))
        lengths += [len(row) for row in coded["input_ids"]]
    return Tokens(
        np.concatenate(ids),
        np.concatenate(types) if types else None,
        np.cumsum(lengths, dtype=np.int64),
        spec.tokenizer.pad_token_id or 0,
        getattr(spec.tokenizer, "pad_token_type_id", 0) or 0,
        spec.tokenizer.padding_side == "left",
    )


def pad(rows: Sequence[dict[str, NDArray[np.int32]]], tokens: Tokens) -> dict[str, Tensor]:
    """Stack token rows to [b, longest], int64, with an ``attention_mask``."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    position = np.arange(lengths.max())
    real = position >= (lengths.max() - lengths)[:, None] if tokens.left else position < lengths[:, None]
    out = {}
    for key in rows[0]:
        values = np.full(real.shape, tokens.pad_type if key == "token_type_ids" else tokens.pad_id, np.int64)
        values[real] = np.concatenate([row[key] for row in rows])
        out[key] = torch.from_numpy(values)
    out["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return out
