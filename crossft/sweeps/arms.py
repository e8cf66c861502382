"""Arms: what a sweep file varies, written out as overrides of the base config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crossft.errors import ConfigError
from crossft.sweeps.file import SweepFile
from crossft.sweeps.parameters import Parameter, as_text

__all__ = ["DOMAINS", "Arm", "applies", "arguments", "arm_of", "expand", "named_arms", "parameters_of", "placed"]

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

    A parameter counts only where it applies: in its ``arms``, where its ``when`` holds, and an argument of a method
    where that method is on. Of equal arms one is kept. A grid over sources and targets has no run from a domain to
    itself.

    Raises:
        ConfigError: two named arms are equal, a name is unknown, or the sweep has no arm.
    """
    named = named_arms(sweep)
    found: dict[str, Arm] = {}
    for name, overrides in named.items():
        parameters = parameters_of(sweep, name)
        for values in _combinations(sweep, parameters, {**sweep.fixed, **overrides}):
            arm = arm_of(sweep, name, overrides, values)
            source = arm.overrides.get("data.source")
            if source and source == arm.overrides.get("data.target"):
                continue  # of a grid over sources and targets, the pairs
            found.setdefault(json.dumps(arm.overrides, sort_keys=True, default=str), arm)
    arms = placed(list(found.values()))
    _check_equal(sweep, arms)
    return arms


def parameters_of(sweep: SweepFile, name: str) -> list[Parameter]:
    """The parameters of one named arm."""
    return [p for p in sweep.parameters if p.arms is None or name in p.arms]


def arm_of(sweep: SweepFile, name: str, overrides: Mapping[str, Any], values: Mapping[str, Any]) -> Arm:
    """The arm ``name`` with these values of its parameters; they stand in its name, where several are possible."""
    merged = _without_switched_off(sweep, overrides, {**sweep.fixed, **overrides, **values})
    shown = {key: value for key, value in values.items() if key in merged and key not in DOMAINS}
    made = sweep.leave_one_out or sweep.add_one_in
    parts = [name] if sweep.arms or made or not shown else []
    return Arm(",".join([*parts, *_short(shown, parameters_of(sweep, name))]), merged)


def applies(sweep: SweepFile, parameter: Parameter, overrides: Mapping[str, Any]) -> bool:
    """Whether a parameter counts beside these overrides: its ``when`` holds, and its method is on."""
    return parameter.applies(overrides) and (parameter.method is None or _is_on(sweep, parameter.method, overrides))


def _is_on(sweep: SweepFile, method: str, overrides: Mapping[str, Any]) -> bool:
    return overrides.get(f"methods.{method}", method in sweep.methods) not in (None, False)


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """The overrides as command line flags, a class before its arguments."""
    return [f"--{key}={as_text(value)}" for key, value in sorted(overrides.items())]


def named_arms(sweep: SweepFile) -> dict[str, dict[str, Any]]:
    """The arms before the parameters, by name; methods are switched off with null.

    Raises:
        ConfigError: a name, or a condition of a parameter, that cannot be.
    """
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
    named = {**arms, **made} or {"base": {}}
    _check_parameters(sweep, named)
    return named


def _off(methods: Sequence[str]) -> dict[str, Any]:
    return {f"methods.{name}": None for name in methods}


def _combinations(
    sweep: SweepFile, parameters: Sequence[Parameter], overrides: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    if sweep.method == "grid":
        yield from _grid(sweep, parameters, overrides)
        return
    for index in range(sweep.run_cap):
        values: dict[str, Any] = {}
        for parameter in parameters:
            if applies(sweep, parameter, {**overrides, **values}):
                values[parameter.key] = parameter.draw(index)
        yield values


def _grid(sweep: SweepFile, parameters: Sequence[Parameter], overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination, the last parameter's values following one another."""
    if not parameters:
        yield {}
        return
    first, *rest = parameters
    if not applies(sweep, first, overrides):
        yield from _grid(sweep, rest, overrides)
        return
    for value in first.values:
        for others in _grid(sweep, rest, {**overrides, first.key: value}):
            yield {first.key: value, **others}


def _without_switched_off(sweep: SweepFile, own: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arguments of methods that are off, and the switch itself where no config switches them on.

    An argument that the arm gives itself, of a method that nothing names, stays: the parser refuses it by its name.
    """
    kept = {}
    for key, value in overrides.items():
        parts = key.split(".")
        if parts[0] == "methods" and len(parts) > 1:
            off = not _is_on(sweep, parts[1], overrides)
            given = key in own and f"methods.{parts[1]}" not in overrides
            if off and not given and (len(parts) > 2 or parts[1] in sweep.added):
                continue
        kept[key] = value
    return kept


def placed(arms: Sequence[Arm]) -> list[Arm]:
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
        text = f"{value:.6g}" if isinstance(value, float) else as_text(value)
        shown.append(f"{'.'.join(own[-length:])}={text}")
    return shown


def _check_parameters(sweep: SweepFile, named: Mapping[str, Mapping[str, Any]]) -> None:
    """Arms, methods and conditions that the parameters name: known, and said before the parameter itself."""
    known = {*sweep.fixed, *(key for overrides in named.values() for key in overrides)}
    for parameter in sweep.parameters:
        place = f"{sweep.path}: parameters.{parameter.key}"
        twice = [name for name in parameter.arms or named if parameter.key in named.get(name, ())]
        if twice:
            raise ConfigError(
                f"{place}: arm {twice[0]!r} sets this key itself; remove it there, or name the arms that it varies in: "
                f"parameters.{parameter.key}.arms"
            )
        unknown = sorted(set(parameter.arms or ()) - set(named))
        if unknown:
            raise ConfigError(f"{place}.arms: {unknown[0]!r} is no arm; they are {', '.join(named)}")
        for key in parameter.when:
            if key not in known:
                raise ConfigError(
                    f"{place}.when: {key!r} is set by no arm and by no parameter above this one; list it before"
                )
        method = parameter.method
        if method is not None and method not in sweep.methods and f"methods.{method}" not in known:
            raise ConfigError(
                f"{place}: no arm, and no parameter above this one, switches the method {method!r} on, nor does "
                f"{sweep.config}; correct the name, or add methods.{method}: CLASS to an arm"
            )
        known.add(parameter.key)


def _check_equal(sweep: SweepFile, arms: list[Arm]) -> None:
    """Named arms that vanished, and the baseline."""
    names = [arm.name for arm in arms]
    for name in sweep.arms:
        if not any(n == name or n.startswith(f"{name},") for n in names):
            raise ConfigError(f"{sweep.path}: arms.{name} equals an arm before it; change its overrides or remove it")
    if sweep.baseline is not None and sweep.baseline not in names:
        raise ConfigError(
            f"{sweep.path}: baseline={sweep.baseline!r} is no arm; they are {', '.join(dict.fromkeys(names))}"
        )
