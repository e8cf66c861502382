"""Checks of the data module's arguments that need no file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from crossft.data.readers import Reader
from crossft.errors import ConfigError, DataError
from crossft.types import Role

if TYPE_CHECKING:
    from crossft.data.module import DomainData

__all__ = ["check_settings", "names_of_role", "requested"]


def names_of_role(
    source: str | list[str] | None, target: str | list[str] | None, eval: str | list[str] | None
) -> dict[Role, list[str]]:
    """Domain names of each role, in the order of domain ids; a string may hold several, divided by commas.

    Raises:
        ConfigError: no name at all, or one name twice.
    """
    given: dict[Role, str | list[str] | None] = {"source": source, "target": target, "eval": eval}
    roles: dict[Role, list[str]] = {}
    for role, value in given.items():
        names = value.split(",") if isinstance(value, str) else list(value or ())
        roles[role] = [n.strip() for n in names if n.strip()]
    every = [(name, role) for role, names in roles.items() for name in names]
    if not every:
        raise ConfigError(
            "no domain named; set data.source, data.target or data.eval to folders or files under data.root"
        )
    seen: dict[str, Role] = {}
    for name, role in every:
        if name in seen:
            raise ConfigError(
                f"domain {name!r} is named twice, as {seen[name]} and as {role}; a domain has one role, and evaluation "
                "measures every domain anyway"
            )
        seen[name] = role
    return roles


def requested(
    reader: Reader, root: Path, roles: Mapping[Role, list[str]], unlabeled: Mapping[str, bool]
) -> list[tuple[str, Role, bool]]:
    """(name, role, unlabeled) of each domain, in the order of domain ids.

    Raises:
        DataError: the root is no folder.
        ConfigError: a domain that the reader does not find.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; it must hold one folder or file a domain")
    found = reader.domains(root)
    out = [(name, role, unlabeled.get(role, False)) for role, names in roles.items() for name in names]
    for name, role, _ in out:
        if name not in found:
            raise ConfigError(f"data.{role}: no domain {name!r} under {root}; found: {', '.join(found) or 'none'}")
    return out


def check_settings(data: DomainData) -> None:
    """Refuse arguments that cannot work.

    Raises:
        ConfigError: names the argument, its value, what is allowed and the remedy.
    """
    for name in ("batch_size", "eval_batch_size"):
        if getattr(data, name) < 1:
            raise ConfigError(f"data.{name}={getattr(data, name)} must be at least 1")
    for name in ("limit", "shots", "image_size", "max_length", "views"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigError(f"data.{name}={value} must be at least 1, or null for no such limit")
    for name in ("length_window", "num_workers"):
        if getattr(data, name) < 0:
            raise ConfigError(f"data.{name}={getattr(data, name)} must be 0 or more")
    if len(data.splits) != 3 or min(data.splits) < 0 or data.splits[0] <= 0 or abs(sum(data.splits) - 1) > 1e-6:
        raise ConfigError(
            f"data.splits={list(data.splits)} must be three shares (train, validation, test) that add up to 1"
        )
    if not 0 <= data.max_bad < 1:
        raise ConfigError(f"data.max_bad={data.max_bad} must be a share, at least 0 and below 1")
    if data.labels is not None and len(set(data.labels)) != len(data.labels):
        raise ConfigError(f"data.labels={data.labels} names a label twice")
    _check_budget(data)
    _check_roles(data)


def _check_budget(data: DomainData) -> None:
    if data.shots is not None and data.fraction is not None:
        raise ConfigError(f"data.shots={data.shots} and data.fraction={data.fraction} are two label budgets; set one")
    if data.fraction is not None and not 0 < data.fraction <= 1:
        raise ConfigError(f"data.fraction={data.fraction} must be above 0 and at most 1")
    few = data.shots is not None or data.fraction is not None
    if few and data.target_labels == "none":
        raise ConfigError("data.target_labels=none leaves no labels for data.shots or data.fraction; drop one of them")
    if few and not data.roles["target"]:
        raise ConfigError("data.shots and data.fraction budget the labels of a target; set data.target")
    if data.validation_from_labels and not few:
        raise ConfigError(
            "data.validation_from_labels divides the budget of data.shots or data.fraction; set one of them"
        )
    if data.validation_from_labels and data.shots == 1:
        raise ConfigError("data.shots=1 cannot be divided with data.validation_from_labels; ask for 2 or more")
    if data.shots is not None and data.kind == "regression":
        raise ConfigError("data.shots counts labels per class, and data.kind is regression; use data.fraction")


def _check_roles(data: DomainData) -> None:
    for role in data.train_on:
        if role not in ("source", "target"):
            raise ConfigError(f"data.train_on={data.train_on}: {role!r} does not train; allowed: source, target")
        if not data.roles[role]:
            raise ConfigError(f"data.train_on={data.train_on} needs a {role} domain; set data.{role}")
    names = [n for names in data.roles.values() for n in names]
    if data.epoch not in ("longest", "shortest", *names):
        raise ConfigError(f"data.epoch={data.epoch!r} must be longest, shortest or a domain ({', '.join(names)})")
