"""What a configuration may name: classes of a few packages, and nothing that is merely callable."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from crossft.errors import ConfigError, UnsafeConfigError

__all__ = ["ALLOWED", "check_values", "deny_by_default", "take_allowed"]

ALLOWED = (
    "crossft",
    "torch",
    "lightning",
    "torchmetrics",
    "timm",
    "transformers",
    "peft",
    "builtins.dict",
    "builtins.list",
    "builtins.tuple",
    "builtins.set",
    "builtins.str",
    "builtins.int",
    "builtins.float",
    "builtins.bool",
    "collections.OrderedDict",
    "datetime.timedelta",
    "pathlib.Path",
)
"""Packages and containers that a class path may lie in; ``--allow PACKAGE`` adds one for one command."""


_granted: set[str] = set()


def take_allowed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``--allow PACKAGE`` off the command line; nowhere else can a package be allowed.

    Returns:
        The other arguments, and the packages.

    Raises:
        ConfigError: a package's name is missing or is not a dotted name.
    """
    rest: list[str] = []
    packages: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--allow":
            packages.append(next(words, ""))
        elif word.startswith("--allow="):
            packages.append(word.partition("=")[2])
        else:
            rest.append(word)
    for package in packages:
        if not package or not all(part.isidentifier() for part in package.split(".")):
            raise ConfigError(
                f"--allow {package or '(nothing)'}: give the name of an importable package, as in my_project"
            )
    return rest, packages


def deny_by_default(packages: Sequence[str] = ()) -> None:
    """Let configs import from ``ALLOWED`` and ``packages`` only, and read local files only.

    What an earlier command of this process was allowed is taken back.
    """
    if "jsonargparse" in {package.split(".")[0] for package in packages}:
        raise ConfigError("--allow jsonargparse would let a config lift these limits; it cannot be allowed")
    withdrawn = _granted - set(packages)
    _granted.update(packages)
    set_parsing_settings(
        import_path_denylist=["*", *sorted(withdrawn)],
        import_path_allowlist=[*ALLOWED, *packages],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,
        config_read_mode_urls_enabled=False,
    )


def check_values(config: Any, packages: Sequence[str] = ()) -> None:
    """Refuse functions among the parsed values: an allowed package also holds loaders and shells.

    A class path must name a class; where its argument has a type, jsonargparse checks that the class is of that type.
    A bare function fits every ``Callable`` argument, so none is accepted from whichever allowed package, unless the
    user named the package with ``--allow``.

    Raises:
        UnsafeConfigError: a value is a function, method or module, or a class path names none of the allowed classes.
    """
    for name, value in _leaves(config, ""):
        if name.endswith("class_path") and isinstance(value, str):
            value = _named(name, value, packages)
        if inspect.isroutine(value) or inspect.ismodule(value):
            module = str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
            if not _within(module, packages):
                path = f"{module}.{getattr(value, '__qualname__', value)}"
                raise UnsafeConfigError(
                    f"{name}={path} names a function; a config may only name classes of the type that the argument "
                    "asks for. Write a class with these arguments, and allow its package with --allow PACKAGE"
                )


def _within(path: str, packages: Sequence[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _named(name: str, path: str, packages: Sequence[str]) -> Any:
    """What a class path names; nothing outside the allowed packages is imported for it."""
    if not _within(path, [*ALLOWED, *packages]):
        raise UnsafeConfigError(
            f"{name}: {path!r} lies outside the packages a config may name; if you trust it, add "
            f"--allow {path.split('.')[0]} to the command line"
        )
    module, _, last = path.rpartition(".")
    try:
        return getattr(import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name}={path!r} names nothing: {error}; check the spelling") from error


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, Namespace):
        items = vars(value).items()
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))
