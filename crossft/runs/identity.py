"""What a run is called: the hash of its config, its id, and the versions behind it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from crossft import __version__
from crossft.runs.files import plain

__all__ = ["config_hash", "run_id", "versions"]

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "transformers", "numpy", "wandb")


def config_hash(config: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """Hash a config: 16 hex digits, equal for equal values whatever the order of the keys.

    Args:
        config: nested plain values, as parsed from ``config.yaml``.
        ignore: keys that do not change what is trained, dotted where nested (``run.dir``, ``trainer.logger``).
    """
    kept = _without(config, frozenset(ignore))
    text = json.dumps(plain(kept), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without(config: Mapping[str, Any], ignore: frozenset[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name not in ignore:
            kept[key] = _without(value, ignore, f"{name}.") if isinstance(value, Mapping) else value
    return kept


def run_id(arm: str, seed: int, hash: str) -> str:
    """Name of a run's folder, computed and never time-stamped: ``gradual-s0-1f3a92bc``."""
    name = re.sub(r"[^A-Za-z0-9._=+]+", "-", arm).strip("-.") or "run"
    return f"{name[:80]}-s{seed}-{hash[:8]}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; nothing is imported for it."""
    found = {"crossft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
