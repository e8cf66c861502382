"""Runs of a W&B project as records, through W&B's public API; the same columns as those of run folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from crossft.errors import RunError

__all__ = ["PREFIX", "read_project"]

PREFIX = "wandb:"
"""What a path to compare starts with where it names a W&B project: ``wandb:ENTITY/PROJECT``."""

_ENDS = ("finished", "failed", "interrupted", "pruned")
_STATUS = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "interrupted"}
_STATUS |= {"preempted": "interrupted", "preempting": "running", "running": "running", "pending": "running"}


def read_project(project: str, api: Any = None) -> list[dict[str, Any]]:
    """Read every run of a project that crossft logged, as ``read_records`` does from folders; no file is fetched.

    The W&B summary holds the metrics under the keys of ``summary.json``, and its other fields under ``crossft``; where
    a run ended without them, its config and W&B's state stand in.

    Args:
        project: ``ENTITY/PROJECT``.
        api: a ``wandb.Api``; by default one with the key that ``wandb login`` or ``WANDB_API_KEY`` configured.

    Raises:
        RunError: the project cannot be read, or holds no run of crossft.
    """
    if project.count("/") != 1 or not all(project.split("/")):
        raise RunError(f"{PREFIX}{project} must name a W&B project, as in {PREFIX}ENTITY/PROJECT")
    import wandb

    try:
        api = api or wandb.Api()
        runs = list(api.runs(project, per_page=200, lazy=False))
    except Exception as error:  # whatever the service and the network do
        raise RunError(
            f"W&B project {project} cannot be read ({error}); check the name, and log in with `wandb login`"
        ) from error
    records = list(_records(runs))
    if not records:
        raise RunError(f"W&B project {project} has {len(runs)} runs, and none that crossft fit logged")
    return records


def _records(runs: Iterable[Any]) -> Iterable[dict[str, Any]]:
    for run in runs:
        if "experiment" in run.config and isinstance(run.config.get("data"), Mapping):
            yield _record(run, run.config)


def _record(run: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    summary: Mapping[str, Any] = run.summary_metrics or {}
    told: Mapping[str, Any] = summary.get("crossft") or {}
    roles = {role: _names(config["data"].get(role)) for role in ("source", "target", "eval")}
    domains = told.get("domains") or {role: names for role, names in roles.items() if names}
    status = told.get("status") if told.get("status") in _ENDS else _STATUS.get(run.state, "interrupted")
    lost = f"W&B says {run.state}; see {run.url}" if status == "failed" else None
    record: dict[str, Any] = {
        **{field: told.get(field) for field in ("config_hash", "parent", "checkpoint", "selected_by")},
        "path": run.url,
        "run": run.name or run.id,
        "experiment": config["experiment"],
        "arm": config.get("arm") or run.name,
        "seed": int(config.get("seed_everything") or 0),
        "status": status,
        "seconds": told.get("seconds") or _number(summary.get("_runtime")),
        "source": "+".join(domains.get("source") or []),
        "target": "+".join(domains.get("target") or []),
        "error": told.get("error") or lost,
        "written": datetime.fromisoformat(run.created_at).timestamp(),
        "domains": domains,
        "primary": told.get("primary") or {},
    }
    numbers = {key: _number(value) for key, value in summary.items() if "/" in key}
    return record | {key: value for key, value in numbers.items() if value is not None}


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _number(value: Any) -> float | None:
    """The value where it is a number; W&B writes NaN and infinities as text, and some summaries as mappings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
