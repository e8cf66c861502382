"""Which domains a method of adaptation or generalization reads."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, get_args

from crossft.errors import ConfigError
from crossft.tasks import Task
from crossft.types import Role

__all__ = [
    "Between",
    "Ids",
    "Pair",
    "check_between",
    "class_count",
    "domain_pairs",
    "ids_of",
    "shared_head",
    "source_groups",
]

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]
Between = Literal["roles", "pairs", "sources"]
"""``roles``: all sources against all targets. ``pairs``: each source domain against each target domain, averaged.
``sources``: every two source domains, averaged; for domain generalization, where there is no target to read."""


def ids_of(task: Task, role: Role) -> Ids:
    """Ids of the task's domains with this role."""
    return tuple(i for i, d in enumerate(task.domains) if d.role == role)


def check_between(between: str) -> None:
    """Refuse an unknown ``between``.

    Raises:
        ConfigError: it is not one of ``Between``.
    """
    if between not in get_args(Between):
        raise ConfigError(f"between={between!r} is unknown; allowed: {', '.join(get_args(Between))}")


def domain_pairs(task: Task, between: Between) -> list[Pair]:
    """The pairs of domain groups whose distance a method makes small.

    Raises:
        ConfigError: ``sources`` with fewer than two source domains.
    """
    sources, targets = ids_of(task, "source"), ids_of(task, "target")
    if between == "sources":
        return [((a,), (b,)) for a, b in combinations(source_groups(task, "between='sources'"), 2)]
    if between == "pairs":
        return [((s,), (t,)) for s in sources for t in targets]
    return [(sources, targets)]


def source_groups(task: Task, who: str) -> Ids:
    """Ids of the source domains, of which there must be two or more.

    Raises:
        ConfigError: there are fewer.
    """
    sources = ids_of(task, "source")
    if len(sources) < 2:
        raise ConfigError(
            f"{who} compares source domains and the run has {len(sources)}; name two or more in data.source"
        )
    return sources


def shared_head(task: Task, who: str, roles: tuple[Role, ...] = ("source", "target")) -> str:
    """Key of the one head that all domains of these roles share.

    Raises:
        ConfigError: their label spaces differ, or the labels are not exclusive classes.
    """
    domains = [d for d in task.domains if d.role in roles]
    keys = {task.head_keys[d.name] for d in domains}
    if len(keys) != 1:
        raise ConfigError(
            f"{who} needs one label space for {' and '.join(roles)}; these domains have {len(keys)}: "
            f"{', '.join(f'{d.name} ({len(d.labels)} labels)' for d in domains)}. Name the labels in data.labels"
        )
    if domains[0].kind != "multiclass":
        raise ConfigError(f"{who} reads class probabilities; domain {domains[0].name!r} has {domains[0].kind} labels")
    return keys.pop()


def class_count(task: Task, head: str, who: str) -> int:
    """Classes of the head, of which there must be two or more.

    Raises:
        ConfigError: there is one.
    """
    count = next(len(d.labels) for d in task.domains if task.head_keys[d.name] == head)
    if count < 2:
        raise ConfigError(f"{who} needs two classes or more; head {head!r} has {count}")
    return count
