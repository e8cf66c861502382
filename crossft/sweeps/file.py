"""The sweep file: one base config, and what is varied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from crossft.errors import ConfigError
from crossft.runs import higher_is_better
from crossft.sweeps.early import EarlyTerminate, check_search, read_early_terminate
from crossft.sweeps.parameters import Parameter, read_parameters

__all__ = ["SweepFile", "flags_of", "flat", "read_sweep"]

KEYS = (
    "config", "experiment", "description", "method", "run_cap", "metric", "seeds", "baseline",
    "parameters", "arms", "leave_one_out", "add_one_in", "early_terminate",
)  # fmt: skip
RESERVED = ("arm", "experiment", "seed_everything", "run", "config", "data.seed", "trial")
"""Keys that the sweep sets itself for every run."""


@dataclass(frozen=True)
class SweepFile:
    """A sweep file, checked.

    Attributes:
        path: the file.
        experiment: name of the comparison; the file's own name by default.
        config: the base config file.
        method: ``grid`` (every combination), ``random`` (``run_cap`` draws), or ``bayes`` (a search of ``run_cap``
            trials for each arm).
        run_cap: number of draws or trials; each runs with every seed. 0 for a grid.
        metric: key of the metric that ranks the arms, as in ``summary.json``, or None.
        oracle: whether the file says that a search may read test labels.
        early_terminate: how a search ends trials early, or None.
        seeds: the runs' seeds.
        baseline: the arm that others are compared with, or None.
        fixed: overrides that every run has: ``value`` parameters, and the flags of the command line.
        parameters: what is varied.
        arms: overrides of the named arms, in order.
        methods: the methods of the base, in order.
        added: methods that the fixed values or the parameters alone switch on.
        leave_one_out, add_one_in: whether arms are made of the methods so.
    """

    path: Path
    experiment: str
    config: Path
    method: str = "grid"
    run_cap: int = 0
    metric: str | None = None
    oracle: bool = False
    early_terminate: EarlyTerminate | None = None
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    added: frozenset[str] = frozenset()
    leave_one_out: bool = False
    add_one_in: bool = False


def read_sweep(path: Path | str, flags: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file.

    Args:
        path: the file.
        flags: overrides for every run, as ``--key=value`` or ``--key value``; they win over the file's fixed values.

    Raises:
        ConfigError: the file, or a key of it, is not as documented; the message names both.
    """
    path = Path(path)
    given = _given(path)
    config = _config(path, given.get("config"))
    method, run_cap = _method(path, given)
    parameters = read_parameters(given.get("parameters") or {}, f"{path}: parameters")
    always = [p for p in parameters if p.distribution == "constant" and p.arms is None and not p.when]
    fixed = flat({p.key: p.values[0] for p in always}) | flags_of(flags)
    varied = tuple(p for p in parameters if p not in always and p.key not in fixed)
    named = _mapping(path, "arms", given.get("arms"))
    arms = {str(name): flat(_mapping(path, f"arms.{name}", overrides)) for name, overrides in named.items()}
    _check_keys(path, [*fixed, *(p.key for p in varied), *(key for arm in arms.values() for key in arm)])
    _check_grid(path, method, varied)
    own = _methods(flat({"methods": _yaml(config).get("methods") or {}}))
    return SweepFile(
        **_searched(path, given, method, varied),
        path=path,
        experiment=str(given.get("experiment") or path.stem),
        config=config,
        method=method,
        run_cap=run_cap,
        seeds=_seeds(path, given.get("seeds", 1)),
        baseline=given.get("baseline"),
        fixed=fixed,
        parameters=varied,
        arms=arms,
        methods=tuple(dict.fromkeys([*own, *_methods(fixed)])),
        added=frozenset(_methods(fixed) + _methods_of(varied)) - set(own),
        leave_one_out=_of_methods(path, given, "leave_one_out"),
        add_one_in=_of_methods(path, given, "add_one_in"),
    )


def flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested overrides into dotted keys; a ``class_path`` becomes the value of the object's own key."""
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and "class_path" in value:
            found[key] = value["class_path"]
            found |= flat(value.get("init_args") or {}, f"{key}.")
        elif isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key=value`` and ``--key value`` as overrides; values stay text, but for null.

    Raises:
        ConfigError: a word that is no flag, or a flag without a value.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        match = re.fullmatch(r"--([A-Za-z_][\w.]*)(=.*)?", word, re.DOTALL)
        if match is None:
            raise ConfigError(f"{word!r}: after the sweep file come flags of the config, as in --data.root=DIR")
        if match.group(2) is None and not rest:
            raise ConfigError(f"{word} needs a value, as in {word}=VALUE")
        text = match.group(2)[1:] if match.group(2) is not None else rest.pop(0)
        found[match.group(1)] = None if text == "null" else text
    return found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a sweep file ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: holds no mapping; a sweep file has the keys {', '.join(KEYS)}")
    return {str(key): value for key, value in given.items()}


def _given(path: Path) -> dict[str, Any]:
    given = _yaml(path)
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: is no key of a sweep file; it may have {', '.join(KEYS)}")
    return given


def _config(path: Path, name: Any) -> Path:
    """The base config, relative to the sweep file or else to the working directory."""
    if not isinstance(name, str):
        raise ConfigError(
            f"{path}: config={name!r} must name the base config file, as in config: ../vision/domains.yaml"
        )
    for found in (path.parent / name, Path(name)):
        if found.is_file():
            return found
    raise ConfigError(f"{path}: config={name!r} is a file neither beside the sweep file nor in the working directory")


def _method(path: Path, given: Mapping[str, Any]) -> tuple[str, int]:
    method, cap = given.get("method", "grid"), given.get("run_cap")
    if method not in ("grid", "random", "bayes"):
        raise ConfigError(f"{path}: method={method!r} must be grid, random or bayes")
    if method == "grid" and cap is not None:
        raise ConfigError(
            f"{path}: run_cap={cap!r} is the number of draws of `method: random`, or of trials of `method: bayes`; "
            "remove it for a grid"
        )
    if method != "grid" and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        what = "draws" if method == "random" else "trials"
        raise ConfigError(f"{path}: run_cap={cap!r} must be the number of {what}, 1 or more, of `method: {method}`")
    return method, int(cap or 0)


def _mapping(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value or {}, Mapping):
        raise ConfigError(f"{path}: {name}={value!r} must be a mapping, as in {{methods.l2sp.weight: 0.1}}")
    return value or {}


def _metric(path: Path, given: Any) -> tuple[str | None, bool]:
    """The metric's key, and whether a search by test labels is asked for."""
    if given is None:
        return None, False
    if not isinstance(given, Mapping) or "name" not in given or not set(given) <= {"name", "goal", "oracle"}:
        raise ConfigError(f"{path}: metric={given!r} must be {{name: KEY, goal: maximize|minimize}}")
    name, oracle = str(given["name"]), given.get("oracle", False)
    right = "maximize" if higher_is_better(name) else "minimize"
    if given.get("goal", right) != right:
        raise ConfigError(f"{path}: metric.goal={given['goal']!r}: the goal of {name} is {right}")
    if not isinstance(oracle, bool):
        raise ConfigError(f"{path}: metric.oracle={oracle!r} must be true or false")
    return name, oracle


def _searched(path: Path, given: Mapping[str, Any], method: str, varied: Sequence[Parameter]) -> dict[str, Any]:
    """What is searched, and how; checked together."""
    metric, oracle = _metric(path, given.get("metric"))
    early = read_early_terminate(given.get("early_terminate"), f"{path}: early_terminate")
    check_search(path, method, metric, oracle, early, varied)
    if method == "bayes" and given.get("baseline") is not None:
        raise ConfigError(f"{path}: baseline={given['baseline']!r}: in a search every trial is an arm; remove it")
    return {"metric": metric, "oracle": oracle, "early_terminate": early}


def _seeds(path: Path, given: Any) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(given))
    whole = isinstance(given, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in given)
    if not whole or not given or len(set(given)) != len(given):
        raise ConfigError(f"{path}: seeds={given!r} must be a number of seeds, or a list of different seeds")
    return tuple(given)


def _of_methods(path: Path, given: Mapping[str, Any], key: str) -> bool:
    if given.get(key) not in (None, "methods"):
        raise ConfigError(f"{path}: {key}={given[key]!r} must be `methods`, or left out")
    return given.get(key) is not None


def _check_keys(path: Path, keys: Sequence[str]) -> None:
    for key in keys:
        if any(key == name or (key.startswith(f"{name}.") and key != "run.root") for name in RESERVED):
            raise ConfigError(f"{path}: {key} is set by the sweep itself; use `experiment`, `arms` and `seeds`")


def _check_grid(path: Path, method: str, parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        if method == "grid" and not parameter.values:
            raise ConfigError(
                f"{path}: parameters.{parameter.key}: a grid needs value or values; "
                f"to draw from {parameter.distribution} use `method: random` or `method: bayes`"
            )


def _methods(overrides: Mapping[str, Any]) -> list[str]:
    """Names of the methods that dotted overrides give a class."""
    keys = [key.split(".") for key, value in overrides.items() if value not in (None, {})]
    return [key[1] for key in keys if key[0] == "methods" and len(key) == 2]


def _methods_of(parameters: Sequence[Parameter]) -> list[str]:
    """Names of the methods that a parameter switches."""
    return [p.key.split(".")[1] for p in parameters if p.key.startswith("methods.") and p.key.count(".") == 1]
