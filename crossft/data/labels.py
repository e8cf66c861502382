"""Raw labels become a kind and a label space, and then targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossft.errors import LabelError
from crossft.types import Kind

__all__ = ["Label", "blank", "encode", "infer_kind", "label_names", "names_of", "normalize", "outside"]

Label = str | float | tuple[str, ...] | None
"""A label after normalization: a name, a number, several names, or none."""

MANY = 20
"""Non-integer numbers with more distinct values than this are a regression target."""


def normalize(value: Any) -> Label:
    """One raw label in one of four forms: None, a name, a float that is no integer, or a sorted tuple of names.

    Integers (also written as ``3.0``) become the name ``"3"``; ``a|b`` and lists become tuples; NaN and empty
    strings become None.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return tuple(sorted({str(_name(v)) for v in value}))
    if isinstance(value, str):
        if "|" in value:
            return tuple(sorted({v.strip() for v in value.split("|") if v.strip()}))
        return _name(value)
    return _name(value)


def _name(value: Any) -> str | float | None:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    text = str(value).strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    if math.isnan(number):
        return None
    if number.is_integer() and abs(number) < 2**53:
        return str(int(number)) if isinstance(value, (int, float, np.number)) or "." in text else text
    return number


def infer_kind(labels: Iterable[Label]) -> Kind:
    """The kind that fits all labels: lists are multilabel, many distinct non-integer numbers regression."""
    present = [v for v in labels if v is not None]
    if any(isinstance(v, tuple) for v in present):
        return "multilabel"
    numbers = {v for v in present if isinstance(v, float)}
    if numbers and all(_is_number(v) for v in present) and len(set(present)) > MANY:
        return "regression"
    return "multiclass"


def _is_number(value: Label) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def names_of(label: Label, kind: Kind) -> tuple[str, ...]:
    """The label names one label stands for (none for regression)."""
    if label is None or kind == "regression":
        return ()
    if isinstance(label, tuple):
        return label
    return (str(label),)


def label_names(labels: Iterable[Label], kind: Kind) -> tuple[str, ...]:
    """All names in index order: numbers by value, everything else by alphabet; ``("value",)`` for regression."""
    if kind == "regression":
        return ("value",)
    names = {n for v in labels for n in names_of(v, kind)}
    if all(_is_number(n) for n in names):
        return tuple(sorted(names, key=lambda n: (float(n), n)))
    return tuple(sorted(names))


def blank(rows: int, kind: Kind, size: int) -> NDArray[Any]:
    """Targets of ``rows`` unlabeled rows: -1 ([n] int64), or nan ([n, size] multilabel, [n] regression; float32)."""
    if kind == "multiclass":
        return np.full(rows, -1, np.int64)
    return np.full((rows, size) if kind == "multilabel" else rows, np.nan, np.float32)


def encode(labels: Sequence[Label], kind: Kind, names: Sequence[str], where: Sequence[str]) -> NDArray[Any]:
    """Targets of these labels; None gives a blank.

    Args:
        labels: n labels.
        kind: of the space.
        names: label names in index order.
        where: file and row of each label.

    Returns:
        [n] int64, [n, len(names)] float32 (multilabel) or [n] float32 (regression).

    Raises:
        LabelError: a label that is not in ``names``, or not a number for regression.
    """
    index = {n: i for i, n in enumerate(names)}
    out = blank(len(labels), kind, len(names))
    for row, label in enumerate(labels):
        if label is None:
            continue
        problem = outside(label, kind, index)
        if problem:
            raise LabelError(f"{where[row]}: {problem}")
        if kind == "regression":
            out[row] = float(label)  # type: ignore[arg-type]
        elif kind == "multiclass":
            out[row] = index[str(label)]
        else:
            out[row] = 0
            out[row, [index[n] for n in names_of(label, kind)]] = 1
    return out


def outside(label: Label, kind: Kind, index: dict[str, int]) -> str | None:
    """Why a label does not fit the space, or None."""
    if kind == "regression":
        fits = _is_number(label) and math.isfinite(float(label))  # type: ignore[arg-type]
        return None if fits else f"label {label!r} is not a finite number; the domain's kind is regression (data.kind)"
    if kind == "multiclass" and isinstance(label, tuple):
        return f"label {'|'.join(label)!r} names several classes; set data.kind to multilabel, or clean the row"
    for name in names_of(label, kind):
        if name not in index:
            space = ", ".join(index)
            return f"label {name!r} is outside the label space {{{space}}}; correct it, or extend data.labels"
    return None
