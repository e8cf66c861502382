"""Reading, checking and splitting one domain, before label spaces are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossft.data import labels as lab
from crossft.data import splits as sp
from crossft.data.checks import Verify, content_of
from crossft.data.readers import SPLIT_NAMES, Reader
from crossft.data.table import Columns, Table
from crossft.errors import ConfigError, DataError, LabelError, SplitError
from crossft.types import Domain, Kind, Role

__all__ = ["Draft", "Options", "Splitting", "draft_of", "split_of"]

Splitting = Literal["auto", "given", "stratified", "random", "group"]
Manifest = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Options:
    """What decides how domains are read, checked and split; documented at `DomainData`."""

    root: Path
    reader: Reader
    columns: Columns
    kind: Kind | Literal["auto"] = "auto"
    labels: tuple[str, ...] | None = None
    split: Splitting = "auto"
    splits: tuple[float, float, float] = (0.7, 0.1, 0.2)
    split_seed: int = 0
    shots: int | None = None
    fraction: float | None = None
    validation_from_labels: bool = False
    verify: Verify = "changed"
    on_error: Literal["raise", "quarantine"] = "raise"
    max_bad: float = 0.01
    limit: int | None = None
    manifest: Manifest = field(default_factory=dict)
    known: Mapping[str, Domain] = field(default_factory=dict)

    def space(self, name: str) -> tuple[Kind | Literal["auto"], tuple[str, ...] | None]:
        """Kind and label names of a domain, as far as they are settled: an earlier run's, else those asked for."""
        return (self.known[name].kind, self.known[name].labels) if name in self.known else (self.kind, self.labels)


@dataclass
class Draft:
    """A domain on its way: rows ordered by sample id. Labels are normalized for labeled domains, untouched else."""

    name: str
    role: Role
    unlabeled: bool
    table: Table
    ids: NDArray[np.int64]
    content: NDArray[np.int64]
    labels: list[lab.Label]
    kind: Kind
    split: NDArray[np.int8]
    note: str = ""
    dropped: list[int] = field(default_factory=list)


def draft_of(name: str, role: Role, unlabeled: bool, options: Options, bad: list[dict[str, str]]) -> Draft:
    """Read a domain, drop or refuse its bad rows, and order the others by sample id; nothing is split yet."""
    table = options.reader.read(options.root, name, options.columns)
    if not len(table):
        raise DataError(f"domain {name!r} under {options.root} has no rows")
    content, problems = content_of(table, f"{options.root.resolve()}/{name}", options.verify)
    problems |= table.problems
    labels: list[lab.Label] = list(table.labels or [None] * len(table))
    kind: Kind = "multiclass"
    wrong: dict[int, str] = {}
    if not unlabeled:
        if table.labels is None:
            raise LabelError(
                f"domain {name!r} has no labels, and its role {role} needs them: name the column with "
                f"data.label_column, or set data.{'target' if role != 'source' else 'source'}_labels=none"
            )
        labels = [lab.normalize(v) for v in labels]
        settled, names = options.space(name)
        kind = lab.infer_kind(labels) if settled == "auto" else settled
        wrong = _bad_labels(labels, kind, names)
    dropped = _refuse(name, table, {**wrong, **problems}, len(table), options, bad, set(wrong) - set(problems))
    keep = [i for i in range(len(table)) if i not in dropped]
    ties = [(table.splits[i] if table.splits else "", "" if unlabeled else str(labels[i])) for i in keep]
    ids = sp.sample_ids([content[i] for i in keep], [str(tie) for tie in ties])
    order = np.argsort(ids)[: options.limit]
    rows = [keep[i] for i in order]
    return Draft(
        name, role, unlabeled, table.keep(rows), ids[order], np.array([content[i] for i in rows], np.int64),
        [labels[i] for i in rows], kind, np.zeros(len(rows), np.int8),
    )  # fmt: skip


def _bad_labels(labels: Sequence[lab.Label], kind: Kind, names: tuple[str, ...] | None) -> dict[int, str]:
    index = {n: i for i, n in enumerate(names or lab.label_names(labels, kind))}
    wrong = {i: "no label" for i, v in enumerate(labels) if v is None}
    for i, v in enumerate(labels):
        problem = None if v is None else lab.outside(v, kind, index)
        if problem:
            wrong[i] = problem
    return wrong


def _refuse(
    name: str, table: Table, problems: Mapping[int, str], total: int, options: Options,
    bad: list[dict[str, str]], label_rows: set[int],
) -> set[int]:  # fmt: skip
    """Raise on the first bad row, or quarantine all of them where that is asked for and they are few."""
    if not problems:
        return set()
    first = min(problems)
    if options.on_error == "raise":
        more = f" (and {len(problems) - 1} more bad rows)" if len(problems) > 1 else ""
        error = LabelError if first in label_rows else DataError
        raise error(
            f"{table.where[first]}: {problems[first]}{more}; repair or remove it, or set data.on_error=quarantine"
        )
    if len(problems) > options.max_bad * total:
        raise DataError(
            f"domain {name!r}: {len(problems)} of {total} rows are bad, more than data.max_bad={options.max_bad} "
            f"allows; the first is {table.where[first]}: {problems[first]}"
        )
    bad += [{"domain": name, "where": table.where[i], "reason": problems[i]} for i in sorted(problems)]
    return set(problems)


def split_of(draft: Draft, options: Options, bad: list[dict[str, str]]) -> Draft:
    """Split a draft: as an earlier leg did, as given, or by content; an unlabeled domain without a look at labels."""
    table, name = draft.table, draft.name
    if name in options.manifest:
        return _inherited(draft, options.manifest[name])
    mode = options.split
    if mode == "auto":
        mode = "given" if table.splits is not None else "group" if table.groups is not None else "stratified"
    if mode == "given" and table.splits is None:
        raise ConfigError(
            f"data.split=given, but domain {name!r} names no splits; set data.split_column, or data.split=stratified"
        )
    if mode == "group" and table.groups is None:
        raise ConfigError("data.split=group needs a column: set data.group")
    note: str = "random" if draft.unlabeled and mode == "stratified" else mode
    absent: tuple[str, ...] = ("val", "test")
    if mode == "given":
        draft = _disjoint(_given(draft, options, bad), options, bad)
        empty = tuple(s for i, s in enumerate(sp.SPLITS) if options.splits[i] > 0 and not (draft.split == i).any())
        absent = () if "train" in empty else empty
        note += f"; {' and '.join(absent)} carved from train" if absent else ""
    if absent:
        draft = replace(draft, split=_carved(draft, absent, mode, options))
    return replace(draft, note=note)


def _given(draft: Draft, options: Options, bad: list[dict[str, str]]) -> Draft:
    """The splits that the rows name; a row that names none of them is a bad row."""
    names = draft.table.splits or []
    remedy = "; data.split=stratified does not read it"
    problems = {
        i: ("names no split" if s is None else f"unknown split {s!r}, allowed: {', '.join(SPLIT_NAMES)}") + remedy
        for i, s in enumerate(names)
        if s not in sp.SPLITS
    }
    dropped = _refuse(draft.name, draft.table, problems, len(names), options, bad, set())
    draft = _kept(draft, [i for i in range(len(names)) if i not in dropped]) if dropped else draft
    return replace(draft, split=sp.given([str(s) for s in draft.table.splits or []], draft.name, draft.role != "eval"))


def _carved(draft: Draft, absent: Sequence[str], mode: str, options: Options) -> NDArray[np.int8]:
    """Draw the absent splits from the training rows; shares are those of all rows."""
    rows = np.flatnonzero(draft.split == 0)
    unit = sp.units(draft.content.tolist(), draft.table.groups)[rows]
    strata = None
    if not draft.unlabeled and draft.kind != "regression" and mode not in ("group", "random"):
        strata = ["|".join(lab.names_of(draft.labels[i], draft.kind)) for i in rows]
    scale = len(draft.split) / len(rows)
    shares = [f * scale if s in absent else 0.0 for s, f in zip(sp.SPLITS, options.splits)]
    shares[0] = 1 - sum(shares)
    if shares[0] <= 0:
        raise SplitError(
            f"domain {draft.name!r} has too few training rows ({len(rows)}) to carve {' and '.join(absent)} from; "
            "lower their shares in data.splits, or set them to 0"
        )
    out = draft.split.copy()
    out[rows] = sp.assign(unit.tolist(), shares, options.split_seed, strata)
    return out


def _disjoint(draft: Draft, options: Options, bad: list[dict[str, str]]) -> Draft:
    """Refuse or drop rows of a given split whose content stands in a later one too."""
    pairs = sp.content_overlap(draft.content, draft.split)
    if not pairs:
        return draft
    where, names = draft.table.where, [sp.SPLITS[s] for s in draft.split]
    if options.on_error == "raise":
        i, j = pairs[0]
        raise SplitError(
            f"{where[i]} ({names[i]}) has the content of {where[j]} ({names[j]}), {len(pairs)} such rows in domain "
            f"{draft.name!r}; remove one copy, or set data.on_error=quarantine to drop the {names[i]} copies"
        )
    problems = {i: f"content of {where[j]} ({names[j]}) in split {names[i]}" for i, j in pairs}
    dropped = _refuse(draft.name, draft.table, problems, len(where), options, bad, set())
    keep = [i for i in range(len(where)) if i not in dropped]
    return _kept(draft, keep)


def _kept(draft: Draft, keep: Sequence[int]) -> Draft:
    gone = np.setdiff1d(draft.ids, draft.ids[list(keep)])
    return replace(
        draft, table=draft.table.keep(keep), ids=draft.ids[keep], content=draft.content[keep],
        labels=[draft.labels[i] for i in keep], split=draft.split[keep], dropped=[*draft.dropped, *gone.tolist()],
    )  # fmt: skip


def _inherited(draft: Draft, manifest: Mapping[str, Sequence[int]]) -> Draft:
    """Splits of an earlier leg; rows it dropped are dropped again.

    Raises:
        SplitError: the rows are not those the splits were made of.
    """
    dropped = set(manifest.get("dropped", ()))
    draft = _kept(draft, [i for i, sample in enumerate(draft.ids.tolist()) if sample not in dropped])
    place = {int(i): sp.SPLITS.index(s) for s in sp.SPLITS for i in manifest.get(s, ())}
    here = set(draft.ids.tolist())
    new, gone = len(here - place.keys()), len(place.keys() - here)
    if new or gone:
        raise SplitError(
            f"domain {draft.name!r} is not what the inherited splits were made of: {new} new rows, {gone} missing; "
            "restore the data (and data.limit), or start without the earlier run"
        )
    return replace(draft, split=np.array([place[i] for i in draft.ids.tolist()], np.int8), note="inherited")
