"""The ``parameters`` of a sweep file, in W&B's words: fixed values, lists of values, distributions to draw from."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from crossft.errors import ConfigError

__all__ = ["Parameter", "as_text", "read_parameters"]

_WORDS = {
    "categorical": ("values", "probabilities"),
    "constant": ("value",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max", "q"),
    "normal": ("mu", "sigma"),
    "q_normal": ("mu", "sigma", "q"),
    "log_normal": ("mu", "sigma"),
}
_DEFAULTS = {"mu": 0.0, "sigma": 1.0, "q": 1.0}


@dataclass(frozen=True)
class Parameter:
    """One key of the config, and the values it takes.

    Attributes:
        key: dotted key of the config, as on the command line.
        distribution: W&B's name of it; ``constant`` and ``categorical`` for ``value`` and ``values``.
        values: what it takes, where they are listed.
        settings: ``min``, ``max``, ``q``, ``mu``, ``sigma``, ``probabilities`` as given, with W&B's defaults.
        arms: the arms it applies to; None: all.
        when: other keys with the values, as text, that they must have for this one to apply.
    """

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] | None = None
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """Name of the method whose argument this is; None where it is none's."""
        parts = self.key.split(".")
        return parts[1] if parts[0] == "methods" and len(parts) > 2 else None

    def applies(self, overrides: Mapping[str, Any]) -> bool:
        """Whether the keys in ``when`` have one of their values among ``overrides``."""
        return all(key in overrides and as_text(overrides[key]) in values for key, values in self.when.items())

    def draw(self, index: int) -> Any:
        """The value of draw ``index``: a function of key and index alone, so that more draws keep the former ones."""
        source = random.Random(f"{self.key}/{index}")
        if self.values:
            return source.choices(self.values, self.settings.get("probabilities"))[0]
        if self.distribution == "int_uniform":
            return source.randint(self.settings["min"], self.settings["max"])
        return self.quantized(self._continuous(source))

    def quantized(self, value: float) -> Any:
        """The nearest multiple of ``q``; the value itself where the distribution has none."""
        if not self.distribution.startswith("q_"):
            return value
        q = self.settings["q"]
        multiple = round(value / q) * q
        return int(multiple) if isinstance(q, int) else multiple

    def _continuous(self, source: random.Random) -> float:
        name, given = self.distribution.removeprefix("q_"), self.settings
        if name in ("normal", "log_normal"):
            value = source.gauss(given["mu"], given["sigma"])
            return math.exp(value) if name == "log_normal" else value
        low, high = given["min"], given["max"]
        if name == "log_uniform_values":
            return math.exp(source.uniform(math.log(low), math.log(high)))
        value = source.uniform(low, high)
        return math.exp(value) if name == "log_uniform" else value


def read_parameters(given: Any, where: str) -> list[Parameter]:
    """Read the mapping ``parameters``; nested ``parameters`` become dotted keys.

    Args:
        given: key -> {value}, {values}, {min, max}, {distribution, ...} or {parameters}.
        where: file and key, for messages.

    Raises:
        ConfigError: an unknown word, a missing one, or values that cannot be.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={given!r} must map config keys to value, values or a distribution")
    return list(_read(given, where, ""))


def _read(given: Mapping[str, Any], where: str, prefix: str) -> Iterator[Parameter]:
    for name, words in given.items():
        key, place = f"{prefix}{name}", f"{where}.{name}"
        if not isinstance(words, Mapping):
            raise ConfigError(f"{place}={words!r}: write `{name}: {{value: {words}}}` for a fixed value")
        if "parameters" in words:
            if not isinstance(words["parameters"], Mapping):
                raise ConfigError(f"{place}.parameters={words['parameters']!r} must map config keys to their values")
            yield from _read(words["parameters"], f"{place}.parameters", f"{key}.")
        else:
            yield _parameter(key, dict(words), place)


def _parameter(key: str, words: dict[str, Any], where: str) -> Parameter:
    arms = words.pop("arms", None)
    if arms is not None and (not isinstance(arms, list) or not arms):
        raise ConfigError(f"{where}.arms={arms!r} must be a list of names of arms; leave it out for all")
    when = _conditions(words.pop("when", {}), f"{where}.when")
    name = words.pop("distribution", None) or _implied(words, where)
    if str(name) not in _WORDS:
        raise ConfigError(f"{where}.distribution={name!r} is none of {', '.join(_WORDS)}")
    unknown = sorted(set(words) - set(_WORDS[name]))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}: {name} takes {', '.join((*_WORDS[name], 'arms', 'when'))}")
    settings = {w: words.get(w, _DEFAULTS.get(w)) for w in _WORDS[name] if w not in ("value", "values")}
    values = [words["value"]] if "value" in words else words.get("values", [])
    _check(name, values, settings, where)
    return Parameter(key, name, tuple(values), settings, tuple(arms) if arms is not None else None, when)


def as_text(value: Any) -> str:
    """A value as it stands on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _conditions(given: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{where}={given!r} must map keys to a value or a list of values, as in {{model.optimizer: SGD}}"
        )
    listed = {str(key): value if isinstance(value, list) else [value] for key, value in given.items()}
    return {key: tuple(map(as_text, values)) for key, values in listed.items()}


def _implied(words: Mapping[str, Any], where: str) -> str:
    """W&B's default distribution for the words given."""
    if "value" in words:
        return "constant"
    if "values" in words:
        return "categorical"
    if {"min", "max"} <= set(words):
        return "int_uniform" if all(_is_int(words[w]) for w in ("min", "max")) else "uniform"
    raise ConfigError(f"{where} has none of value, values, distribution, min and max; give one of them")


def _check(name: str, values: Any, settings: Mapping[str, Any], where: str) -> None:
    if name in ("constant", "categorical"):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.values={values!r} must be a list that is not empty")
        shares = settings.get("probabilities")
        if shares is not None and not (isinstance(shares, list) and len(shares) == len(values) and _are_shares(shares)):
            raise ConfigError(
                f"{where}.probabilities={shares!r} must be one number, 0 or more, for each of {values}, not all 0"
            )
        return
    wrong = [w for w, value in settings.items() if not _is_number(value)]
    if wrong:
        raise ConfigError(
            f"{where}.{wrong[0]}={settings[wrong[0]]!r}: {name} needs a number (YAML reads 1e-3 as text: 1.0e-3)"
        )
    if name == "int_uniform" and not all(map(_is_int, settings.values())):
        raise ConfigError(f"{where}: min={settings['min']}, max={settings['max']}: int_uniform needs whole numbers")
    if "min" in settings and settings["min"] > settings["max"]:
        raise ConfigError(f"{where}: min={settings['min']} is above max={settings['max']}; swap them")
    if name.endswith("log_uniform_values") and settings["min"] <= 0:
        raise ConfigError(f"{where}.min={settings['min']} must be above 0 for {name}")
    if name == "log_uniform" and settings["max"] > 700:  # e**700 is about the largest number there is
        raise ConfigError(
            f"{where}.max={settings['max']}: log_uniform draws e**min to e**max; log_uniform_values takes the values"
        )
    if settings.get("q", 1) <= 0 or settings.get("sigma", 1) < 0:
        raise ConfigError(f"{where}: q must be above 0 and sigma 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_shares(values: list[Any]) -> bool:
    return all(_is_number(value) and value >= 0 for value in values) and sum(values) > 0


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
