"""A sweep file for W&B: what is registered there, and which run the arguments of ``wandb agent`` ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossft.errors import ConfigError
from crossft.runs import higher_is_better
from crossft.sweeps.arms import Arm, applies, arm_of, named_arms, parameters_of
from crossft.sweeps.file import SweepFile
from crossft.sweeps.parameters import Parameter

__all__ = ["ARM", "SEED", "asked_arm", "read_asked", "registration"]

ARM, SEED = "arm", "seed_everything"


def registration(sweep: SweepFile, flags: Sequence[str] = (), allow: Sequence[str] = ()) -> dict[str, Any]:
    """The sweep in W&B's own words, with the command that ``wandb agent`` starts for every run.

    Arm and seed are parameters of it. What only crossft knows (``arms``, ``when`` and fixed values) stays in the file,
    which every agent reads, so the file and the working directory must be there where an agent runs.

    Args:
        sweep: the file.
        flags: the flags after it, which every run gets.
        allow: the ``--allow`` flags.

    Raises:
        ConfigError: W&B's search would take the seed for a parameter, or has no such rule for early termination.
    """
    if sweep.method != "grid" and len(sweep.seeds) > 1:
        raise ConfigError(
            f"{sweep.path}: seeds={list(sweep.seeds)}: W&B's {sweep.method} search runs one seed a trial and would "
            "search for the best one; give one seed, or use `crossft sweep run`, which takes the mean over seeds"
        )
    command = ["${env}", "${interpreter}", "-m", "crossft.cli", "sweep", "agent", str(sweep.path), "${args_json_file}"]
    values: dict[str, list[Any]] = {ARM: list(named_arms(sweep)), SEED: list(sweep.seeds)}
    parameters = {key: {"value": v[0]} if len(v) == 1 else {"values": v} for key, v in values.items()}
    found: dict[str, Any] = {
        "name": sweep.experiment,
        "method": sweep.method,
        "command": [*command, *(f"--allow={package}" for package in allow), *flags],
        "parameters": {**parameters, **{p.key: _words(p) for p in sweep.parameters}},
    }
    if sweep.metric is not None:
        goal = "maximize" if higher_is_better(sweep.metric) else "minimize"
        found["metric"] = {"name": sweep.metric, "goal": goal}
    if sweep.run_cap:
        found["run_cap"] = sweep.run_cap
    if sweep.early_terminate is not None:
        early = sweep.early_terminate
        if early.type != "hyperband":
            raise ConfigError(f"{sweep.path}: early_terminate.type={early.type!r}: W&B has hyperband alone; use that")
        found["early_terminate"] = {"type": "hyperband", "min_iter": early.min_iter, "eta": early.eta}
    return found


def _words(parameter: Parameter) -> dict[str, Any]:
    settings = {word: value for word, value in parameter.settings.items() if value is not None}
    if parameter.values:
        return {"values": list(parameter.values), **settings}
    return {"distribution": parameter.distribution, **settings}


def read_asked(path: Path) -> dict[str, Any]:
    """Read the JSON file that ``wandb agent`` writes for ``${args_json_file}``.

    Raises:
        ConfigError: it cannot be read, or has no arm or no seed.
    """
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as the arguments of wandb agent: {error}") from error
    if not isinstance(asked, dict) or not {ARM, SEED} <= set(asked):
        raise ConfigError(
            f"{path}: holds no {ARM} and {SEED}; register the sweep with `crossft sweep wandb FILE`, which makes them "
            "parameters of it"
        )
    return asked


def asked_arm(sweep: SweepFile, asked: Mapping[str, Any]) -> Arm:
    """The arm that the agent's arguments ask for: those of its parameters that apply, as overrides of the config.

    Raises:
        ConfigError: the arm, or a parameter, is not in the file.
    """
    named = named_arms(sweep)
    name = str(asked[ARM])
    if name not in named:
        raise ConfigError(f"{sweep.path}: wandb agent asks for the arm {name!r}; the file has {', '.join(named)}")
    unknown = sorted(set(asked) - {ARM, SEED} - {p.key for p in sweep.parameters})
    if unknown:
        raise ConfigError(
            f"{sweep.path}: wandb agent asks for {unknown[0]!r}, which is no parameter of the file; register the sweep "
            "again after a change of the file"
        )
    values: dict[str, Any] = {}
    for parameter in parameters_of(sweep, name):
        if applies(sweep, parameter, {**sweep.fixed, **named[name], **values}) and parameter.key in asked:
            values[parameter.key] = asked[parameter.key]
    return arm_of(sweep, name, named[name], values)
