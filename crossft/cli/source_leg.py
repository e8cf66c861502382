"""``source_leg``: a mapping laid over the run's config, and its flags on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

__all__ = ["laid_over", "take_source_leg"]

_FLAG = re.compile(r"^--source_leg\.([^=]+)(=.*)?$", re.DOTALL)


def take_source_leg(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split flags such as ``--source_leg.trainer.max_epochs=3`` off the command line.

    ``source_leg`` is a mapping without a schema, and jsonargparse (4.53) keeps the last of several flags that go deeper
    than its first level. As everywhere, a class may be named by its path alone, and its arguments follow.

    Returns:
        The other arguments, and the mapping.
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        match = _FLAG.match(word)
        if not match:
            rest.append(word)
            continue
        text = match.group(2)[1:] if match.group(2) else (words.pop(0) if words else "")
        *parents, last = match.group(1).split(".")
        place = found
        for name in parents:
            place = _inside(_arguments(place, name), name)
        _arguments(place, last)[last] = _plain_value(text)
    return rest, found


def _arguments(place: dict[str, Any], name: str) -> dict[str, Any]:
    """Where ``name`` is set: of an object, unless it is one of these words, among the class's arguments."""
    return place if name in ("class_path", "init_args", "dict_kwargs") else place.get("init_args", place)


def _inside(place: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping under ``name``; a class that stands there by its path becomes an object with arguments."""
    inner = place.get(name)
    if isinstance(inner, str):
        inner = place[name] = {"class_path": inner, "init_args": {}}
    elif not isinstance(inner, dict):
        inner = place[name] = {}
    return inner


def _plain_value(text: str) -> Any:
    value = yaml.safe_load(text) if text else ""
    try:
        return float(value) if isinstance(value, str) else value  # 3e-4 is a text to YAML
    except ValueError:
        return value


def laid_over(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` laid over it; another class starts from its own defaults."""
    merged = dict(base)
    if overrides.get("class_path", base.get("class_path")) != base.get("class_path"):
        merged.pop("init_args", None)
    for key, value in overrides.items():
        if key == "params" and value is None:
            continue  # of a torch optimizer named by its class: the parser fills it in and does not take it back
        old = merged.get(key)
        merged[key] = laid_over(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged
