"""From tables to prepared domains: checks, splits, label spaces, label budgets, and the quarantine of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossft.data import labels as lab
from crossft.data import splits as sp
from crossft.data.checks import Verify, content_of
from crossft.data.readers import Reader
from crossft.data.table import Columns, Table
from crossft.errors import ConfigError, DataError, LabelError, SplitError
from crossft.types import Domain, Kind, Role

__all__ = ["Draft", "Options", "Prepared", "first_rows", "prepare"]

Splitting = Literal["auto", "given", "stratified", "group"]
Space = tuple[Kind, tuple[str, ...]]
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


@dataclass
class Prepared:
    """A domain ready for use: n rows ordered by sample id.

    Attributes:
        domain: name, role and label space.
        modality: ``image`` or ``text``.
        inputs, where: of each row.
        ids: sample ids [n].
        split: index into train, val, test [n].
        targets: blank where the row is not labeled.
        labeled: [n] bool.
        unlabeled: whether the whole domain counts as unlabeled (its test labels are read by the test alone).
        note: how the splits were made.
        dropped: sample ids that were dropped because a later split holds their content.
    """

    domain: Domain
    modality: str
    inputs: Sequence[Any]
    where: list[str]
    ids: NDArray[np.int64]
    split: NDArray[np.int8]
    targets: NDArray[Any]
    labeled: NDArray[np.bool_]
    unlabeled: bool
    note: str
    dropped: list[int]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Positions of a split's rows, in the order of sample ids."""
        return np.flatnonzero(self.split == sp.SPLITS.index(split))

    def known(self, split: str) -> NDArray[Any]:
        """Targets of a split's labeled rows."""
        rows = self.rows(split)
        return self.targets[rows[self.labeled[rows]]]

    def manifest(self) -> dict[str, list[int]]:
        """Sample ids of each split, and those dropped."""
        return {**{s: self.ids[self.rows(s)].tolist() for s in sp.SPLITS}, "dropped": self.dropped}


def first_rows(prepared: Sequence[Prepared]) -> list[int]:
    """Dataset row of each domain's first row, where the domains stand one after the other."""
    return np.cumsum([0, *(len(p.ids) for p in prepared[:-1])]).tolist()


def prepare(
    requests: Sequence[tuple[str, Role, bool]], options: Options
) -> tuple[tuple[Prepared, ...], list[dict[str, str]]]:
    """Read, check and split the requested domains.

    Args:
        requests: (name, role, unlabeled) of each domain, in the order of domain ids.
        options: how.

    Returns:
        The prepared domains, and the quarantined rows (domain, where, reason).

    Raises:
        DataError, LabelError, SplitError, ConfigError: what is wrong with which row or setting.
    """
    bad: list[dict[str, str]] = []
    drafts = []
    for name, role, unlabeled in requests:
        draft = _draft(name, role, unlabeled, options, bad)
        drafts.append(_split(draft, options, bad))
    modalities = {d.table.modality: d.name for d in drafts}
    if len(modalities) > 1:
        raise ConfigError(
            f"the domains mix images ({modalities['image']!r}) and texts ({modalities['text']!r}); train on one kind"
        )
    spaces = _spaces(drafts, options)
    return tuple(_finish(d, s, options) for d, s in zip(drafts, spaces)), bad


def _draft(name: str, role: Role, unlabeled: bool, options: Options, bad: list[dict[str, str]]) -> Draft:
    table = options.reader.read(options.root, name, options.columns)
    if not len(table):
        raise DataError(f"domain {name!r} under {options.root} has no rows")
    content, problems = content_of(table, f"{options.root.resolve()}/{name}", options.verify)
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
        kind = lab.infer_kind(labels) if options.kind == "auto" else options.kind
        wrong = _bad_labels(labels, kind, options.labels)
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


def _split(draft: Draft, options: Options, bad: list[dict[str, str]]) -> Draft:
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
        draft = _disjoint(replace(draft, split=sp.given(table.splits or [], name, draft.role != "eval")), options, bad)
        empty = tuple(s for i, s in enumerate(sp.SPLITS) if options.splits[i] > 0 and not (draft.split == i).any())
        absent = () if "train" in empty else empty
        note += f"; {' and '.join(absent)} carved from train" if absent else ""
    if absent:
        draft = replace(draft, split=_carved(draft, absent, mode, options))
    return replace(draft, note=note)


def _carved(draft: Draft, absent: Sequence[str], mode: str, options: Options) -> NDArray[np.int8]:
    """Draw the absent splits from the training rows; shares are those of all rows."""
    rows = np.flatnonzero(draft.split == 0)
    unit = sp.units(draft.content.tolist(), draft.table.groups)[rows]
    strata = None
    if not draft.unlabeled and draft.kind != "regression" and mode != "group":
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


def _spaces(drafts: Sequence[Draft], options: Options) -> list[Domain]:
    """The label space of each domain; unlabeled and eval domains take the first trained space that fits."""
    out: dict[str, Domain] = {}
    trained = [d for d in drafts if not d.unlabeled and d.role != "eval"]
    for d in trained:
        out[d.name] = Domain(d.name, d.role, d.kind, options.labels or lab.label_names(d.labels, d.kind))
    known: list[Space] = list(dict.fromkeys((d.kind, d.labels) for d in out.values()))
    for d in drafts:
        if d.name not in out:
            kind, names = _adopted(d, known, options)
            out[d.name] = Domain(d.name, d.role, kind, names)
    return [out[d.name] for d in drafts]


def _readable(draft: Draft) -> list[lab.Label]:
    """The labels that may be read: all, or only those of the test split where the domain is unlabeled."""
    if not draft.unlabeled:
        return draft.labels
    return [lab.normalize(v) if s == 2 else None for v, s in zip(draft.labels, draft.split)]


def _adopted(draft: Draft, known: Sequence[Space], options: Options) -> Space:
    labels = _readable(draft)
    if not known:
        kind = lab.infer_kind(labels) if options.kind == "auto" else options.kind
        return kind, options.labels or lab.label_names(labels, kind)
    problem = ""
    for kind, names in known:
        index = {n: i for i, n in enumerate(names)}
        issues = [(i, lab.outside(v, kind, index)) for i, v in enumerate(labels) if v is not None]
        wrong = next(((i, p) for i, p in issues if p), None)
        if wrong is None:
            return kind, names
        problem = problem or f"{draft.table.where[wrong[0]]}: {wrong[1]}"
    raise LabelError(
        f"{problem}; domain {draft.name!r} is not trained on with labels, so it needs a trained label space"
    )


def _finish(draft: Draft, domain: Domain, options: Options) -> Prepared:
    labels = _readable(draft)
    readable = np.array([v is not None for v in labels], bool)
    few = draft.role == "target" and not draft.unlabeled and (options.shots is not None or options.fraction is not None)
    labeled = readable & (_budget(draft, domain, options) | (draft.split == 2)) if few else readable
    kept = [v if on else None for v, on in zip(labels, labeled)]
    targets = lab.encode(kept, domain.kind, domain.labels, draft.table.where)
    done = Prepared(
        domain, draft.table.modality, draft.table.inputs, draft.table.where, draft.ids, draft.split, targets, labeled,
        draft.unlabeled, draft.note, draft.dropped,
    )  # fmt: skip
    _check_splits(done, options, few)
    return done


def _budget(draft: Draft, domain: Domain, options: Options) -> NDArray[np.bool_]:
    """Which train and validation rows keep their labels under ``shots`` or ``fraction``."""
    names = [lab.names_of(v, domain.kind) for v in draft.labels]
    shares = [1.0, 0.0]
    if options.validation_from_labels:
        total = options.splits[0] + options.splits[1]
        shares = [options.splits[0] / total, options.splits[1] / total]
    out = np.zeros(len(names), bool)
    for part, share in enumerate(shares):
        rows = np.flatnonzero(draft.split == part)
        if share == 0 or not len(rows):
            continue
        mine, ids = [names[i] for i in rows], draft.ids[rows]
        if options.shots is not None:
            held = max(1, round(options.shots * shares[1])) if shares[1] else 0
            k = held if part == 1 else options.shots - held
            picked = sp.pick_shots(mine, ids, k, options.split_seed, f"the {sp.SPLITS[part]} split of {draft.name!r}")
        else:
            assert options.fraction is not None
            picked = sp.pick_fraction(mine, ids, options.fraction * shares[0], options.split_seed)
        out[rows[picked]] = True
    return out


def _check_splits(done: Prepared, options: Options, few: bool) -> None:
    name, role = done.domain.name, done.domain.role
    for split, share in zip(sp.SPLITS, options.splits):
        if share > 0 and not len(done.rows(split)) and (split == "test" or role != "eval"):
            raise SplitError(
                f"the {split} split of domain {name!r} is empty ({len(done.ids)} rows in all); add rows, or change "
                f"data.splits={list(options.splits)}"
            )
    if done.domain.kind != "multiclass" or done.unlabeled:
        return
    for split in sp.SPLITS:
        classes = np.unique(done.known(split))
        if len(classes) == 1 and not (few and split == "val"):
            raise SplitError(
                f"the {split} split of domain {name!r} holds the single class "
                f"{done.domain.labels[int(classes[0])]!r}; add rows of another class, or change data.split"
            )
