"""Arms: what a sweep file varies, written out as overrides of the base config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crossft.errors import ConfigError
from crossft.sweeps.file import SweepFile
from crossft.sweeps.parameters import Parameter

__all__ = ["Arm", "arguments", "expand"]

DOMAINS = ("data.source", "data.target")
"""Runs of other domains belong to another table, so these are no part of an arm's name."""


@dataclass(frozen=True)
class Arm:
    """One row of the comparison, for one pair of domains.

    Attributes:
        name: as in ``summary.json``; arms of other domains may share it.
        overrides: dotted config keys and their values, the sweep's fixed values included.
        place: its domains, where the sweep varies them.
    """

    name: str
    overrides: Mapping[str, Any]
    place: str = ""

    @property
    def label(self) -> str:
        """The name, with the domains where the sweep varies them."""
        return f"{self.name} ({self.place})" if self.place else self.name


def expand(sweep: SweepFile) -> list[Arm]:
    """Write out every arm: named arms and arms made of methods, each with every combination of the parameters.

    A parameter of a method that an arm switches off is left out, and of equal arms one is kept. A grid over sources and
    targets has no run from a domain to itself.

    Raises:
        ConfigError: two named arms are equal, a name is unknown, or the sweep has no arm.
    """
    named = _named(sweep)
    _check_names(sweep, list(named))
    found: dict[str, Arm] = {}
    for name, overrides in named.items():
        parameters = [p for p in sweep.parameters if p.arms is None or name in p.arms]
        for values in _combinations(sweep, parameters):
            merged = _without_switched_off({**sweep.fixed, **overrides, **values}, sweep.added)
            if merged.get("data.source") and merged["data.source"] == merged.get("data.target"):
                continue  # of a grid over sources and targets, the pairs
            shown = {key: value for key, value in values.items() if key in merged and key not in DOMAINS}
            parts = [] if len(named) == 1 and shown and not sweep.arms else [name]
            arm = Arm(",".join([*parts, *_short(shown, parameters)]), merged)
            found.setdefault(json.dumps(merged, sort_keys=True, default=str), arm)
    arms = _placed(list(found.values()))
    _check_equal(sweep, arms, named)
    return arms


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """The overrides as command line flags, a class before its arguments."""
    return [f"--{key}={_text(value)}" for key, value in sorted(overrides.items())]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _named(sweep: SweepFile) -> dict[str, dict[str, Any]]:
    """The arms before the parameters, by name; methods are switched off with null."""
    arms = dict(sweep.arms)
    if (sweep.leave_one_out or sweep.add_one_in) and not sweep.methods:
        raise ConfigError(
            f"{sweep.path}: leave_one_out and add_one_in need methods, and {sweep.config} switches none on; "
            "name some there, or as fixed parameters (methods.NAME: {value: CLASS})"
        )
    made: dict[str, dict[str, Any]] = {}
    if sweep.leave_one_out:
        made["all"] = {}
        made |= {f"no-{name}": _off([name]) for name in sweep.methods}
    if sweep.add_one_in:
        made["none"] = _off(sweep.methods)
        made |= {f"only-{name}": _off([m for m in sweep.methods if m != name]) for name in sweep.methods}
    twice = sorted(set(made) & set(arms))
    if twice:
        raise ConfigError(f"{sweep.path}: arms.{twice[0]}: this name is made by leave_one_out or add_one_in; rename it")
    return {**arms, **made} or {"base": {}}


def _off(methods: Sequence[str]) -> dict[str, Any]:
    return {f"methods.{name}": None for name in methods}


def _combinations(sweep: SweepFile, parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    keys = [p.key for p in parameters]
    if sweep.method == "grid":
        for values in itertools.product(*(p.values for p in parameters)):
            yield dict(zip(keys, values))
    else:
        for index in range(sweep.run_cap):
            yield {p.key: p.draw(index) for p in parameters}


def _without_switched_off(overrides: dict[str, Any], added: Collection[str]) -> dict[str, Any]:
    """Leave out the arguments of methods that are off, and the switch itself where no config switches them on."""
    off = [key for key, value in overrides.items() if key.startswith("methods.") and value is None]
    below = tuple(f"{key}." for key in off)
    gone = {key for key in off if key.removeprefix("methods.") in added}
    return {key: value for key, value in overrides.items() if key not in gone and not key.startswith(below)}


def _placed(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with their domains, where these differ."""
    varied = [key for key in DOMAINS if len({str(arm.overrides.get(key)) for arm in arms}) > 1]
    return [replace(arm, place=" → ".join(str(arm.overrides.get(key)) for key in varied)) for arm in arms]


def _short(values: Mapping[str, Any], parameters: Sequence[Parameter]) -> list[str]:
    """``lr=0.1`` for each value: the shortest end of each key that tells it from the other parameters."""
    keys = [p.key.split(".") for p in parameters]
    shown = []
    for key, value in values.items():
        own = key.split(".")
        length = next(n for n in range(1, len(own) + 1) if sum(k[-n:] == own[-n:] for k in keys) == 1 or n == len(own))
        text = f"{value:.6g}" if isinstance(value, float) else _text(value)
        shown.append(f"{'.'.join(own[-length:])}={text}")
    return shown


def _check_names(sweep: SweepFile, names: list[str]) -> None:
    for parameter in sweep.parameters:
        unknown = sorted(set(parameter.arms or ()) - set(names))
        if unknown:
            raise ConfigError(
                f"{sweep.path}: parameters.{parameter.key}.arms: {unknown[0]!r} is no arm; they are {', '.join(names)}"
            )


def _check_equal(sweep: SweepFile, arms: list[Arm], named: Mapping[str, Any]) -> None:
    """Named arms that vanished, and the baseline."""
    names = [arm.name for arm in arms]
    for name in sweep.arms:
        if not any(n == name or n.startswith(f"{name},") for n in names):
            raise ConfigError(f"{sweep.path}: arms.{name} equals an arm before it; change its overrides or remove it")
    if sweep.baseline is not None and sweep.baseline not in names:
        raise ConfigError(
            f"{sweep.path}: baseline={sweep.baseline!r} is no arm; they are {', '.join(dict.fromkeys(names))}"
        )
