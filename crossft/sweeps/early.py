"""What a search reads: its metric, without test labels unless asked for; and how it ends trials early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossft.errors import ConfigError
from crossft.sweeps.parameters import Parameter

__all__ = ["EarlyTerminate", "check_search", "read_early_terminate"]

_WORDS = {"hyperband": ("min_iter", "max_iter", "s", "eta"), "median": ("min_iter", "min_trials")}
_LEAST = {"min_iter": 1, "max_iter": 1, "s": 1, "eta": 2, "min_trials": 1}


@dataclass(frozen=True)
class EarlyTerminate:
    """How trials are ended early, in W&B's words; an iteration is one validation of the run.

    Attributes:
        type: ``hyperband``: after ``min_iter``, ``min_iter * eta``, ``min_iter * eta**2``, ... iterations the best
            1 / ``eta`` of the trials that got there go on (asynchronous successive halving, Li et al. 2020, which is
            what W&B runs under this name). ``median``: from iteration ``min_iter`` on a trial ends whose best value is
            worse than the median of the others at the same iteration (Golovin et al. 2017, section 3.2.2).
        min_iter: first iteration at which a trial may end.
        eta: as above.
        min_trials: trials that have to finish before the first is ended by the median.
    """

    type: str
    min_iter: int
    eta: int = 3
    min_trials: int = 5


def read_early_terminate(given: Any, where: str) -> EarlyTerminate | None:
    """Read ``early_terminate``; None where it is not there.

    Hyperband is given by ``min_iter``, or by ``max_iter`` and the number ``s`` of brackets, as in W&B: the first
    bracket ends after max_iter / eta**s iterations.

    Raises:
        ConfigError: an unknown type or word, or a number that cannot be.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) or str(given.get("type")) not in _WORDS:
        raise ConfigError(
            f"{where}={given!r} must be {{type: hyperband, min_iter: N}} or {{type: median, min_iter: N}}"
        )
    kind = str(given["type"])
    words = {str(key): value for key, value in given.items() if key != "type"}
    for word, value in words.items():
        if word not in _WORDS[kind]:
            raise ConfigError(f"{where}.{word}: {kind} takes {', '.join(_WORDS[kind])}")
        if not isinstance(value, int) or isinstance(value, bool) or value < _LEAST[word]:
            raise ConfigError(f"{where}.{word}={value!r} must be a whole number, {_LEAST[word]} or more")
    if kind == "median":
        return EarlyTerminate(kind, words.get("min_iter", 1), min_trials=words.get("min_trials", 5))
    eta = words.get("eta", 3)
    if ("min_iter" in words) == ("max_iter" in words) or ("max_iter" in words) != ("s" in words):
        raise ConfigError(f"{where}: hyperband needs min_iter, or max_iter and s; and not both")
    first = words["min_iter"] if "min_iter" in words else max(1, int(words["max_iter"] / eta ** words["s"]))
    return EarlyTerminate(kind, first, eta)


def check_search(
    path: Path,
    method: str,
    metric: str | None,
    oracle: bool,
    early: EarlyTerminate | None,
    parameters: Sequence[Parameter],
) -> None:
    """Refuse a search that cannot be, or that would read test labels without saying so.

    Raises:
        ConfigError: names the key and the remedy.
    """
    if method != "bayes":
        if oracle:
            raise ConfigError(f"{path}: metric.oracle is for `method: bayes`, which chooses by the metric; remove it")
        if early is not None:
            raise ConfigError(f"{path}: early_terminate is for `method: bayes`; remove it for method: {method}")
        return
    if metric is None:
        raise ConfigError(f"{path}: method: bayes needs `metric`, as in metric: {{name: target/val/accuracy}}")
    _check_metric(path, metric, oracle, early)
    if not any(p.key not in ("data.source", "data.target") for p in parameters):
        raise ConfigError(f"{path}: method: bayes has nothing to search; give a parameter values, or min and max")
    for p in parameters:
        if p.distribution in ("normal", "q_normal", "log_normal") or p.settings.get("probabilities"):
            what = "probabilities" if p.values else p.distribution
            raise ConfigError(
                f"{path}: parameters.{p.key}: {what} is for `method: random`; a search needs values, or min and max"
            )
        if p.key in ("data.source", "data.target") and not p.values:
            raise ConfigError(f"{path}: parameters.{p.key} needs values: a trial is run for every pair of domains")


def _check_metric(path: Path, metric: str, oracle: bool, early: EarlyTerminate | None) -> None:
    """Only ``DOMAIN/val/METRIC`` is measured without test labels; a gain and a retention are made of test metrics."""
    parts = metric.split("/")
    honest = len(parts) == 3 and parts[1] == "val"
    if not honest and not oracle:
        raise ConfigError(
            f"{path}: metric.name={metric!r} reads the labels of the test split, so the search would choose by what "
            "it is judged by. Search by a validation metric (target/val/accuracy; target/val/infomax or "
            "source/val/accuracy where the target has no labels), or say `oracle: true` beside the name"
        )
    if honest and oracle:
        raise ConfigError(f"{path}: metric.oracle=true: {metric} reads no test label; remove it")
    if early is not None and not honest:
        raise ConfigError(
            f"{path}: early_terminate reads the metric at every validation, and metric.name={metric!r} is measured "
            "at the end alone; use DOMAIN/val/METRIC, or remove early_terminate"
        )
