"""Metrics of a starting model, measured once for all runs that start from it and differ in methods alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from crossft.callbacks.monitoring.checkpoint_io import sha256
from crossft.cli.parser import Settings
from crossft.data import DomainData
from crossft.errors import RunError
from crossft.runs import RunFolder, config_hash, read_json, write_json

__all__ = ["adopt_before", "keep_before", "read_before", "shared_before"]

_SECTIONS = ("model", "data", "trainer")
_NOT_MEASURED = (
    "model.init_args.domains", "model.init_args.optimizer", "model.init_args.schedule", "data.root", "data.num_workers",
    "data.verify", "data.cache_images", "data.inputs", "trainer.logger", "trainer.callbacks", "trainer.max_epochs",
    "trainer.max_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.default_root_dir",
    "trainer.profiler",
)  # fmt: skip
"""Keys that do not change what is measured before training, or stand in the hash by content."""


def shared_before(settings: Settings, data: DomainData, init: Path) -> Path | None:
    """Where runs that start from checkpoint ``init`` keep what they measure of it: ``PARENT/measured/HASH.json``.

    The hash is over the model's and the data's settings and content, the trainer's and the checkpoint: not over the
    methods. None where the checkpoint lies in no finished run.
    """
    try:
        parent = RunFolder.open(init)
        if parent.summary()["status"] != "finished":
            return None
    except RunError:
        return None
    plain = settings.plain()
    measured = {key: plain.get(key) for key in _SECTIONS}
    content: dict[str, Any] = {"data_content": data.fingerprint, "init_content": sha256(init)}
    return parent.path / "measured" / f"{config_hash({**measured, **content}, _NOT_MEASURED)}.json"


def read_before(path: Path) -> dict[str, float]:
    """The metrics in a ``before.json``.

    Raises:
        RunError: it holds none.
    """
    found = read_json(path)
    metrics = found.get("metrics") if isinstance(found, dict) else None
    if not isinstance(metrics, dict) or not all(v is None or type(v) in (int, float) for v in metrics.values()):
        raise RunError(f"{path} does not hold metrics by name; remove the file, and the run measures them again")
    return metrics


def adopt_before(folder: RunFolder, shared: Path | None) -> None:
    """Take over what a sibling measured; for the first process, before any other exists."""
    if shared is not None and shared.is_file() and not folder.before.is_file():
        with suppress(RunError):  # damaged: it is measured again
            read_before(shared)
            write_json(folder.before, read_json(shared))


def keep_before(folder: RunFolder, shared: Path | None) -> None:
    """Keep what this run measured, for its siblings."""
    if shared is not None:
        with suppress(OSError):  # a parent that cannot be written to is no reason to fail
            write_json(shared, read_json(folder.before))
