"""Which rows train together, and in which shares: pools with exact integer quotas."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossft.data.prepare import Prepared, first_rows
from crossft.data.sampler import Pool, quotas
from crossft.errors import ConfigError
from crossft.types import Domain, Role

__all__ = ["Balance", "leader_of", "pools"]

Balance = Literal["none", "class", "domain"]


def pools(
    prepared: Sequence[Prepared],
    labeled_roles: Collection[Role],
    unlabeled_roles: Collection[Role],
    mix: Mapping[str, float] | None,
    balance: Balance,
    batch_size: int,
    lengths: NDArray[np.int64] | None = None,
) -> tuple[Pool, ...]:
    """The pools of the training mix.

    Args:
        prepared: all domains.
        labeled_roles: roles whose rows train: the labeled ones, or all where a domain has none that are labeled.
        unlabeled_roles: roles whose unlabeled rows train as well; of a role that is not among ``labeled_roles``, all
            rows, none with its label.
        mix: share of each role or domain; None for equal roles, and domains of one role by size.
        balance: ``class`` draws classes evenly within a pool, ``domain`` gives each domain an equal share.
        batch_size: rows of a micro-batch of one process.
        lengths: token count of every dataset row, or None.

    Raises:
        ConfigError: the mix names nothing that trains, leaves a domain without a row, or holds no labeled row.
    """
    parts: list[tuple[Prepared, int, bool, NDArray[np.int64]]] = []
    for number, p in enumerate(prepared):
        role = p.domain.role
        if role not in labeled_roles and role not in unlabeled_roles:
            continue
        rows = p.rows("train")
        known, other = rows[p.labeled[rows]], rows[~p.labeled[rows]]
        if role not in labeled_roles:
            known, other = rows[:0], rows
        if len(known):
            parts.append((p, number, True, known))
        if len(other) and (role in unlabeled_roles or not len(known)):
            parts.append((p, number, False, other))
    _check(parts)
    shares = _shares(parts, mix, balance)
    rows_each = quotas(shares, batch_size)
    starts = first_rows(prepared)
    for (p, _, labeled, _), quota, share in zip(parts, rows_each, shares):
        if quota == 0:
            raise ConfigError(
                f"data.batch_size={batch_size} leaves no row for the {'' if labeled else 'un'}labeled rows of domain "
                f"{p.domain.name!r} (share {share:.3f}); raise the batch size or its share in data.mix"
            )
    return tuple(
        _pool(p, number, labeled, rows, starts[number], quota, balance, lengths)
        for (p, number, labeled, rows), quota in zip(parts, rows_each)
    )


def _check(parts: Sequence[tuple[Prepared, int, bool, NDArray[np.int64]]]) -> None:
    if not any(labeled for _, _, labeled, _ in parts):
        names = ", ".join(repr(p.domain.name) for p, *_ in parts) or "no domain"
        raise ConfigError(
            f"the training mix ({names}) holds no labeled row; add a labeled role to data.train_on, or set data.shots"
        )
    domains = [p.domain for p, _, labeled, _ in parts if labeled]
    kinds = {d.kind for d in domains}
    if len(kinds) > 1:
        raise ConfigError(
            f"the training mix holds labels of kinds {', '.join(sorted(kinds))}; train them in separate legs"
        )
    if kinds == {"multilabel"} and len({d.labels for d in domains}) > 1:
        raise ConfigError("multilabel domains that train together need one label space; name it in data.labels")


def _shares(
    parts: Sequence[tuple[Prepared, int, bool, NDArray[np.int64]]], mix: Mapping[str, float] | None, balance: Balance
) -> list[float]:
    """Share of each part: its domain's share, divided evenly between labeled and unlabeled rows."""
    domains = {p.domain.name: (p.domain.role, 0) for p, *_ in parts}
    for p, _, _, rows in parts:
        domains[p.domain.name] = (p.domain.role, domains[p.domain.name][1] + len(rows))
    roles = sorted({role for role, _ in domains.values()})
    given = dict(mix) if mix is not None else dict.fromkeys(domains if balance == "domain" else roles, 1.0)
    _check_mix(given, domains, roles)
    share = {n: given[n] for n in domains if n in given}
    for role in roles:
        rest = {
            n: (1 if balance == "domain" else size) for n, (r, size) in domains.items() if r == role and n not in given
        }
        for n, size in rest.items():
            if role not in given:
                raise ConfigError(
                    f"data.mix={given} has no share for domain {n!r} ({role}), which is in the training mix"
                )
            share[n] = given[role] * size / sum(rest.values())
    counts = {n: sum(p.domain.name == n for p, *_ in parts) for n in domains}
    return [share[p.domain.name] / counts[p.domain.name] for p, *_ in parts]


def _check_mix(given: Mapping[str, float], domains: Collection[str], roles: Sequence[str]) -> None:
    for key, value in given.items():
        if key not in domains and key not in roles:
            raise ConfigError(
                f"data.mix names {key!r}, which is not in the training mix; allowed: {', '.join([*roles, *domains])}"
            )
        if not value > 0:
            raise ConfigError(f"data.mix: the share of {key!r} is {value}; it must be above 0")


def _pool(
    p: Prepared, number: int, labeled: bool, rows: NDArray[np.int64], start: int, quota: int, balance: Balance,
    lengths: NDArray[np.int64] | None,
) -> Pool:  # fmt: skip
    classes = None
    if balance == "class" and labeled:
        if p.domain.kind != "multiclass":
            raise ConfigError(f"data.sampler=class needs classes; domain {p.domain.name!r} has kind {p.domain.kind}")
        classes = p.targets[rows].astype(np.int64)
    name = f"{p.domain.name}/{'labeled' if labeled else 'unlabeled'}"
    own = None if lengths is None or classes is not None else lengths[start + rows]
    return Pool(name, number, labeled, start + rows, quota, classes, own)


def leader_of(epoch: str, domains: Sequence[Domain], mixed: Sequence[Pool]) -> str | int:
    """``longest``, ``shortest``, or the id of the domain whose pass makes an epoch.

    Raises:
        ConfigError: the domain is not in the training mix.
    """
    names = {domains[p.domain].name: p.domain for p in mixed}
    if epoch in names or epoch in ("longest", "shortest"):
        return names.get(epoch, epoch)
    raise ConfigError(
        f"data.epoch={epoch!r} is not in the training mix; allowed: {', '.join(['longest', 'shortest', *names])}"
    )
