"""What a configuration may name: classes of a few packages, and nothing that is merely callable."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
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
    """Let configs import from ``ALLOWED`` and ``packages`` only, and read local files only."""
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *packages],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,
        config_read_mode_urls_enabled=False,
    )


def check_values(config: Any, packages: Sequence[str] = ()) -> None:
    """Refuse functions among the parsed values: an allowed package also holds loaders and shells.

    A class path must name a class of the type that its argument asks for (jsonargparse checks that); a bare function
    fits every ``Callable`` argument, so none is accepted, from whichever allowed package, unless the user named the
    package with ``--allow``.

    Raises:
        UnsafeConfigError: a value is a function, method or module.
    """
    for name, value in _leaves(config, ""):
        if inspect.isroutine(value) or inspect.ismodule(value):
            module = str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
            if not any(module == p or module.startswith(f"{p}.") for p in packages):
                path = f"{module}.{getattr(value, '__qualname__', value)}"
                raise UnsafeConfigError(
                    f"{name}={path} names a function; a config may only name classes of the type that the argument "
                    "asks for. Write a class with these arguments, and allow its package with --allow PACKAGE"
                )


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
