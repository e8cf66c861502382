"""The cache folder: where it lies, which prefix activations it holds, and removing them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossft.errors import ConfigError, RunError
from crossft.runs.files import read_json

__all__ = ["StoredPrefix", "allocated", "cache_folder", "prefix_folder", "remove_prefixes", "stored_prefixes"]


@dataclass(frozen=True)
class StoredPrefix:
    """Activations of one frozen prefix, as ``crossft.callbacks.caching`` stores them.

    Attributes:
        key: the folder's name, a hash over the prefix.
        backbone: what the user called the backbone.
        stage: the stage that the activations enter; ``features`` where all stages are frozen.
        rows: activations stored, one a sample and view.
        bytes: disk space used.
        used: when a run last opened it, in seconds since 1970.
    """

    key: str
    backbone: str
    stage: str
    rows: int
    bytes: int
    used: float


def cache_folder() -> Path:
    """``$CROSSFT_CACHE``, else ``~/.cache/crossft``."""
    return Path(os.environ.get("CROSSFT_CACHE") or Path.home() / ".cache" / "crossft")


def prefix_folder() -> Path:
    """Where prefix activations lie: one folder a prefix."""
    return cache_folder() / "prefix"


def stored_prefixes(root: Path | None = None) -> list[StoredPrefix]:
    """What ``root`` (default: `prefix_folder`) holds, the last used first."""
    root = root or prefix_folder()
    folders = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    return sorted((_read(folder) for folder in folders), key=lambda p: -p.used)


def remove_prefixes(keys: Sequence[str], root: Path | None = None) -> list[StoredPrefix]:
    """Remove the prefixes with these keys, or unique beginnings of keys; return what was removed.

    A run that reads them goes on: it keeps its files open, and computes anew what it cannot open any more.

    Raises:
        ConfigError: a key fits none or several; nothing is removed then.
    """
    root = root or prefix_folder()
    known = stored_prefixes(root)
    chosen: dict[str, StoredPrefix] = {}
    for key in keys:
        found = [p for p in known if key and p.key.startswith(key)]
        if len(found) != 1:
            names = ", ".join(p.key for p in found or known) or "nothing"
            raise ConfigError(f"{key!r} names {len(found)} cached prefixes, not one; there are: {names}")
        chosen[found[0].key] = found[0]
    for prefix in chosen.values():
        shutil.rmtree(root / prefix.key, ignore_errors=True)
    return list(chosen.values())


def allocated(folder: Path) -> int:
    """Bytes of disk that the files under ``folder`` take; files that vanish meanwhile count 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:
            continue
        total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return total


def _read(folder: Path) -> StoredPrefix:
    about: dict[str, Any] = {}
    used = 0.0
    try:
        about = dict(read_json(folder / "about.json"))
        used = (folder / "about.json").stat().st_mtime
    except (RunError, OSError, TypeError, ValueError):
        pass  # a run was stopped before it described the prefix, or another process removes it now
    return StoredPrefix(
        folder.name,
        str(about.get("backbone", "?")),
        str(about.get("stage", "?")),
        sum(_marked(path) for path in folder.glob("*.sums")),
        allocated(folder),
        used,
    )


def _marked(path: Path) -> int:
    """Rows whose checksum is set."""
    try:
        data = path.read_bytes()
    except OSError:
        return 0
    return sum(map(bool, memoryview(data[: len(data) // 4 * 4]).cast("I")))
