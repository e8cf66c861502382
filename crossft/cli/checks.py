"""Settings that parse but cannot work, refused before any file is read or written."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from crossft.errors import ConfigError, CrossftError

__all__ = ["check_run", "set_sequence"]

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_ARM = re.compile(r"[A-Za-z0-9][^/\\\x00-\x1f=]*(=[^\x00-\x1f]*)?")
"""Sweeps write values into an arm's name (``full,init=runs/a``); `run_id` makes a folder's name of it."""
_SEEDS = 2**32
_LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0}


def check_run(config: Any) -> None:
    """Refuse a parsed config that cannot run; builds nothing but one optimizer over a single number.

    Raises:
        ConfigError: names the argument, its value, what is allowed and the remedy.
    """
    _check_name("experiment", config.experiment, _PLAIN)
    _check_name("arm", config.arm, _ARM)
    seed = config.seed_everything
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEEDS:
        raise ConfigError(f"seed_everything={seed} must be a whole number from 0 to {_SEEDS - 1}; name the seed itself")
    _check_trainer(config.trainer)
    model = config.get("model")
    arguments = (model.get("init_args") if isinstance(model, Namespace) else None) or {}
    dropout = arguments.get("head_dropout")
    if dropout is not None and not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"model.head_dropout={dropout} must be in [0, 1): the share of features dropped before each head; 0 is off"
        )
    if arguments.get("optimizer") is not None:
        _check_optimizer(arguments["optimizer"])


def set_sequence(config: Any) -> None:
    """Turn ``sequence`` into a list, and name its domains to the data: the first is the source, the others targets.

    Raises:
        ConfigError: fewer than two domains, one twice, or other settings that a sequence rules out.
    """
    if config.get("sequence") is None:
        return
    given = config.sequence
    names = [n.strip() for n in (given.split(",") if isinstance(given, str) else given)]
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"sequence={given} must name two or more domains in the order they are learned, each once")
    data = config.data
    for key, own in (("source", names[:1]), ("target", names[1:]), ("eval", [])):
        value = data.get(key)
        listed = value.split(",") if isinstance(value, str) else list(value or ())
        if listed and listed != own:
            raise ConfigError(f"data.{key}={value}: sequence={','.join(names)} names the domains; leave data.{key} out")
    for key in ("shots", "fraction"):
        if data.get(key) is not None:
            raise ConfigError(
                f"data.{key}={data[key]} limits the labels of a target, and a target of a sequence becomes a source of "
                "the next leg with all of them; use data.limit for fewer rows"
            )
    if not config.before:
        raise ConfigError("before=false: a sequence reads there what the first domain's model does on the others")
    config.sequence, data.source, data.target = names, names[0], names[1:]


def _check_name(name: str, value: str, allowed: re.Pattern[str]) -> None:
    """Names become folders below ``run.root``, so they must not be paths."""
    if not allowed.fullmatch(value):
        raise ConfigError(
            f"{name}={value!r} must be a plain name: a letter or digit, then letters, digits and . _ = + -; it names a "
            "folder, so it holds no slash (run.root and run.dir say where runs lie)"
        )


def _check_trainer(trainer: Any) -> None:
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise ConfigError(f"trainer.{name}={value} must be at least {least}; leave it out for the default")
    epochs, steps = trainer.max_epochs, trainer.max_steps
    for name, value in (("max_epochs", epochs), ("max_steps", steps)):
        if value is not None and value < 1 and value != -1:
            raise ConfigError(
                f"trainer.{name}={value} trains nothing; it must be at least 1, or -1 for no such limit. To measure a "
                "model as it is, use crossft test RUN"
            )
    if steps == -1 and (epochs == -1 or (epochs is None and trainer.get("max_time") is not None)):
        raise ConfigError(
            f"trainer.max_epochs={epochs} with trainer.max_steps={steps} never ends, and schedules need an end; "
            "set one of them to 1 or more"
        )
    interval = trainer.get("val_check_interval")
    if interval is not None and not isinstance(interval, int | float):
        raise ConfigError(
            f"trainer.val_check_interval={interval} is a time, at which processes would not meet and no resume would "
            "be exact; give a number of batches, or a share of an epoch"
        )
    if trainer.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm=true: torch's conversion drops the activations inside timm's norm layers, and a "
            "pass that re-estimates statistics would hang; leave it out. model.batchnorm=frozen, the default, does "
            "without; for training give each process a larger data.batch_size"
        )
    limit, overfit = trainer.get("limit_train_batches"), trainer.get("overfit_batches")
    for name, value, allowed, wrong in (
        ("limit_train_batches", limit, "1.0", limit is not None and (isinstance(limit, int) or limit != 1.0)),
        ("overfit_batches", overfit, "0.0", bool(overfit)),
    ):
        if wrong:
            raise ConfigError(
                f"trainer.{name}={value} would end epochs early, and the order of rows and every schedule count whole "
                f"ones; leave it out ({allowed}), and use data.limit for fewer rows, trainer.max_steps for fewer steps"
            )


def _check_optimizer(given: Any) -> None:
    """Build the optimizer once over a single number, so that its own checks speak before anything is read."""
    if not isinstance(given, (Namespace, dict)) or "class_path" not in given:
        return
    path, arguments = given["class_path"], dict(given.get("init_args") or {})
    arguments |= dict(given.get("dict_kwargs") or {})
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name)
    if issubclass(kind, torch.optim.LBFGS):
        raise ConfigError(
            f"model.optimizer={path} evaluates the loss several times a step, and methods add terms and penalties once "
            "a step; use an optimizer that evaluates it once, such as torch.optim.AdamW or torch.optim.SGD"
        )
    if issubclass(kind, torch.optim.SparseAdam):
        raise ConfigError(
            f"model.optimizer={path} takes sparse gradients only, and the gradients here are dense; use "
            "torch.optim.Adam or torch.optim.AdamW"
        )
    try:
        kind([nn.Parameter(torch.zeros(1))], **arguments)
    except CrossftError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        values = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ConfigError(
            f"model.optimizer={path} refuses its arguments: {error} (given: {values or 'none'}); correct the argument "
            "it names, or leave it out for the optimizer's default"
        ) from error
