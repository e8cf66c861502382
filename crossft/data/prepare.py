"""From tables to prepared domains: label spaces, label budgets, and the quarantine of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossft.data import labels as lab
from crossft.data import splits as sp
from crossft.data.drafts import Draft, Options, draft_of, split_of
from crossft.errors import ConfigError, LabelError, SplitError
from crossft.types import Domain, Kind, Role

__all__ = ["Prepared", "first_rows", "prepare"]

Space = tuple[Kind, tuple[str, ...]]


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
    found: list[int] = np.cumsum([0, *(len(p.ids) for p in prepared[:-1])]).tolist()
    return found


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
        draft = draft_of(name, role, unlabeled, options, bad)
        drafts.append(split_of(draft, options, bad))
    modalities = {d.table.modality: d.name for d in drafts}
    if len(modalities) > 1:
        raise ConfigError(
            f"the domains mix images ({modalities['image']!r}) and texts ({modalities['text']!r}); train on one kind"
        )
    spaces = _spaces(drafts, options)
    return tuple(_finish(d, s, options) for d, s in zip(drafts, spaces)), bad


def _spaces(drafts: Sequence[Draft], options: Options) -> list[Domain]:
    """The label space of each domain; unlabeled and eval domains take the first trained space that fits.

    An earlier run's are taken as they are.
    """
    out: dict[str, Domain] = {}
    trained = [d for d in drafts if not d.unlabeled and d.role != "eval"]
    for d in trained:
        out[d.name] = Domain(d.name, d.role, d.kind, options.space(d.name)[1] or lab.label_names(d.labels, d.kind))
    known: list[Space] = list(dict.fromkeys((d.kind, d.labels) for d in out.values()))
    for d in drafts:
        if d.name not in out:
            own = options.known.get(d.name)
            kind, names = _adopted(d, known if own is None else [(own.kind, own.labels)], options)
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
    if options.shots is not None and domain.kind == "regression":
        raise ConfigError(
            f"data.shots={options.shots} counts labels per class, and domain {domain.name!r} has kind regression; use "
            "data.fraction"
        )
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
            what, listed = f"the {sp.SPLITS[part]} split of {draft.name!r}", options.labels is not None
            classes = domain.labels if part == 0 else sorted({name for row in mine for name in row})
            picked = sp.pick_shots(mine, ids, k, options.split_seed, what, classes, listed)
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
