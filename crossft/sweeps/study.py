"""Optuna's part of a search: the study of one arm in ``search.db``, its sampler, its pruner, and a trial's reports."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossft.errors import ConfigError, RunError
from crossft.sweeps.early import EarlyTerminate
from crossft.sweeps.parameters import Parameter, as_text

__all__ = ["TrialReports", "TrialStudy", "check_optuna"]

_STARTUP = 10
_PATIENCE = 60.0
"""Seconds that one process waits for another one's write to the storage."""


def check_optuna() -> Any:
    """Import Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "method: bayes needs Optuna; install it with `pip install crossft[search]`, or use `method: random`"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class TrialStudy:
    """The study of one arm: which values its trials have, and how they ended.

    The sampler of trial number i is seeded by the study's name and i, and reads the trials that ended before: so a
    search that is killed and continued, one run at a time, goes the way of one that was not.

    Args:
        file: the storage, a SQLite file; it is made where it is missing.
        name: the study's name; another space, metric or config is another study.
        maximize: whether more of the metric is better.
        run_cap: number of trials. The first third of them, 10 at most, are drawn at random, the others by TPE
            (Bergstra et al. 2011).
        early: how trials end early, or None.

    Raises:
        ConfigError: Optuna is not installed.
        RunError: the storage cannot be opened.
    """

    def __init__(self, file: Path, name: str, maximize: bool, run_cap: int, early: EarlyTerminate | None) -> None:
        self.file, self.name, self.run_cap, self._early = file, name, run_cap, early
        self._optuna = check_optuna()
        self._startup = min(_STARTUP, math.ceil(run_cap / 3))
        file.parent.mkdir(parents=True, exist_ok=True)
        with _told(file):
            self._storage = _storage(self._optuna, file)
            direction = "maximize" if maximize else "minimize"
            self._optuna.create_study(storage=self._storage, study_name=name, direction=direction, load_if_exists=True)

    def _study(self, number: int = 0) -> Any:
        """The study as trial ``number`` sees it."""
        seed = int.from_bytes(hashlib.sha256(f"{self.name}/{number}".encode()).digest()[:4], "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's notes on options whose defaults differ between its versions
            sampler = self._optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=self._startup, multivariate=True, constant_liar=True
            )
        pruner = _pruner(self._optuna, self._early)
        return self._optuna.load_study(storage=self._storage, study_name=self.name, sampler=sampler, pruner=pruner)

    def trials(self) -> list[Any]:
        """All trials, as Optuna's frozen trials, in order of their numbers."""
        with _told(self.file):
            return list(self._study().get_trials(deepcopy=False))

    @property
    def asked(self) -> int:
        """Number of trials so far; one that is tried again counts once."""
        trials = self.trials()
        waiting = sum(t.state.name == "WAITING" for t in trials)
        found: int = (
            len(trials) - waiting - sum("retry_of" in t.user_attrs for t in trials if t.state.name != "WAITING")
        )
        return found

    @property
    def left(self) -> bool:
        """Whether there is a trial to ask for."""
        return self.asked < self.run_cap or any(t.state.name == "WAITING" for t in self.trials())

    def ask(self) -> Any:
        """Begin a trial."""
        with _told(self.file):
            return self._study(len(self.trials())).ask()

    def unfinished(self) -> list[Any]:
        """Trials of a search that was killed, to be gone on with."""
        running = [t for t in self.trials() if t.state.name == "RUNNING"]
        return [self._optuna.trial.Trial(self._study(t.number), t._trial_id) for t in running]

    def try_again(self) -> None:
        """Ask for the values of every failed trial once more."""
        trials = self.trials()
        again = {t.user_attrs.get("retry_of") for t in trials}
        for trial in trials:
            if trial.state.name == "FAIL" and trial.number not in again:
                self._study().enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})

    def tell(self, number: int, state: str, value: float | None = None, error: str = "") -> None:
        """End a trial: ``COMPLETE`` with its value, ``PRUNED``, or ``FAIL`` with its error."""
        with _told(self.file):
            study = self._study()
            if error:
                trial = next(t for t in study.get_trials(deepcopy=False) if t.number == number)
                self._storage.set_trial_user_attr(trial._trial_id, "error", error)
            study.tell(number, value, state=self._optuna.trial.TrialState[state])

    @staticmethod
    def value_of(parameter: Parameter, trial: Any) -> Any:
        """Draw a parameter of a trial; one that was drawn before keeps its value.

        Numbers are rounded to 6 digits, as they stand in the arm's name.
        """
        key, words = parameter.key, parameter.settings
        if parameter.values:
            texts = [as_text(value) for value in parameter.values]
            return parameter.values[texts.index(trial.suggest_categorical(key, texts))]
        if parameter.distribution == "int_uniform":
            return trial.suggest_int(key, words["min"], words["max"])
        low, high = float(words["min"]), float(words["max"])
        if parameter.distribution == "log_uniform":
            low, high = math.exp(low), math.exp(high)
        value = parameter.quantized(trial.suggest_float(key, low, high, log="log" in parameter.distribution))
        return float(f"{value:.6g}") if isinstance(value, float) else value


class TrialReports:
    """What a run tells the search while it trains; it fails softly: a run does not depend on its search.

    Args:
        file: the storage.
        name: the study's name.
        number: the trial's number.
        early: how trials end early.
    """

    def __init__(self, file: Path, name: str, number: int, early: EarlyTerminate) -> None:
        self._file, self._name, self._number, self._early = file, name, number, early
        self._trial: Any = None

    def worse(self, iteration: int, value: float) -> bool:
        """Report the metric at one validation, counted from 1; whether the trial is to end here."""
        try:
            if self._trial is None:
                self._trial = self._opened()
            known = self._trial.storage.get_trial(self._trial._trial_id).intermediate_values
            if iteration < max(known, default=0):
                return False  # a resumed run goes again through what it had reported
            if iteration not in known:
                self._trial.report(value, iteration)
            return bool(self._trial.should_prune())
        except Exception as error:  # a storage that is gone or locked
            print(f"crossft: the search does not hear from this run: {error}", file=sys.stderr)
            return False

    def _opened(self) -> Any:
        if not self._file.is_file():
            raise RunError(f"{self._file} is missing")
        optuna = check_optuna()
        pruner = _pruner(optuna, self._early)
        study = optuna.load_study(storage=_storage(optuna, self._file), study_name=self._name, pruner=pruner)
        (trial,) = (t for t in study.get_trials(deepcopy=False) if t.number == self._number)
        return optuna.trial.Trial(study, trial._trial_id)


def _storage(optuna: Any, file: Path) -> Any:
    arguments = {"connect_args": {"timeout": _PATIENCE}}
    return optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}", engine_kwargs=arguments)


def _pruner(optuna: Any, early: EarlyTerminate | None) -> Any:
    if early is None:
        return optuna.pruners.NopPruner()
    if early.type == "hyperband":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=early.min_iter, reduction_factor=early.eta)
    return optuna.pruners.MedianPruner(n_startup_trials=early.min_trials, n_warmup_steps=early.min_iter)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into one error that names it."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{file}: the search's storage cannot be used: {first}; restore it, or move it away") from error
