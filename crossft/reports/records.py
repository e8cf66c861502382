"""Run folders as one table of records, one row a run, failed runs included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from crossft.errors import CrossftError, RunError
from crossft.reports.remote import PREFIX, read_project
from crossft.runs import RunFolder, gain, higher_is_better, retention

__all__ = [
    "after_key",
    "domain_keys",
    "find_runs",
    "groups",
    "headline",
    "leaves",
    "primary_of",
    "read_records",
    "with_baseline",
]

_FIELDS = ("experiment", "arm", "seed", "status", "seconds", "config_hash", "parent", "checkpoint", "selected_by")
_DEPTH = 3


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """Find run folders: each path is one, or a folder that holds some up to three levels below (``runs/``).

    Raises:
        RunError: a path does not exist, or nothing was found.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(
                f"{path} is not a folder; give run folders, or the folder of an experiment (runs/EXPERIMENT)"
            )
        found.update(dict.fromkeys(_walk(path, _DEPTH)))
    if not found:
        raise RunError(
            f"no run folder in {', '.join(map(str, paths))}: none holds a summary.json; run `crossft fit` first"
        )
    return list(found)


def _walk(path: Path, depth: int) -> Iterator[Path]:
    if (path / "summary.json").is_file():
        yield path
    elif depth:
        with os.scandir(path) as entries:
            below = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        for name in below:
            yield from _walk(path / name, depth - 1)


def read_records(paths: Sequence[Path | str]) -> pd.DataFrame:
    """Read every run below ``paths``: one row a run, in order of path. A path is a folder, or ``wandb:ENTITY/PROJECT``.

    Columns: ``path``, ``run`` (the folder's name), ``experiment``, ``arm``, ``seed``, ``source``, ``target`` (domain
    names, joined by +), ``status`` (``unreadable`` where the summary is), ``error``, ``seconds``, ``config_hash``,
    ``parent``, ``checkpoint``, ``selected_by``, ``written`` (time of the summary), ``domains`` and ``primary`` (as in
    ``summary.json``), then one float column a metric, NaN where a run has none.

    Raises:
        RunError: a path does not exist, or holds no run; a project cannot be read.
    """
    projects = [str(path).removeprefix(PREFIX) for path in paths if str(path).startswith(PREFIX)]
    folders = [path for path in paths if not str(path).startswith(PREFIX)]
    rows = [_record(path) for path in find_runs(folders)] if folders or not projects else []
    return pd.DataFrame(rows + [row for project in projects for row in read_project(project)])


def _record(path: Path) -> dict[str, Any]:
    try:
        return _row(path, RunFolder(path).summary())
    except CrossftError as error:
        lost = str(error)
    except (AttributeError, TypeError, ValueError) as error:  # valid JSON of other types: one file must not hide others
        lost = f"{path / 'summary.json'} is no summary of crossft: {error}"
    return _row(path, {"status": "unreadable", "error": lost})


def _row(path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    domains = summary.get("domains") or {}
    record: dict[str, Any] = {"path": str(path), "run": path.name, **{f: summary.get(f) for f in _FIELDS}}
    record["experiment"] = record["experiment"] or path.absolute().parent.name
    record["arm"] = record["arm"] or path.name
    for role in ("source", "target"):
        record[role] = "+".join(domains.get(role) or [])
    record |= {"error": summary.get("error"), "written": (path / "summary.json").stat().st_mtime}
    record |= {"domains": domains, "primary": summary.get("primary") or {}}
    for name, value in (summary.get("metrics") or {}).items():
        record[name] = float("nan") if value is None else float(value)
    return record


def leaves(records: pd.DataFrame) -> pd.DataFrame:
    """The runs to compare: without source legs, and without runs that the same arm and seed goes on from.

    An arm that another arm starts from, as a linear probe before fine-tuning, is an arm like any other.
    """
    runs = list(zip(records["run"], records["experiment"], records["arm"], records["seed"]))
    parents = [_run_named(parent) if isinstance(parent, str) else None for parent in records["parent"]]
    chained = {(parent, *run[1:]) for parent, run in zip(parents, runs)}
    legs = [run[0] in parents and (run[2] == "source" or run in chained) for run in runs]
    return records[[not leg for leg in legs]]


def _run_named(parent: str) -> str:
    """Name of the run that ``parent`` says: its folder, or a checkpoint in it."""
    path = PurePath(parent)
    return path.parents[1].name if path.suffix == ".ckpt" and len(path.parents) > 1 else path.name


def groups(records: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs that may be compared: those of one experiment, source and target. Yields a title and the runs.

    Runs that failed before their domains were known, or cannot be read, go with the first group of their experiment.
    """
    for experiment, runs in records.groupby("experiment", sort=False):
        lost = (runs["source"] == "") & (runs["target"] == "")
        first = True
        for (source, target), some in runs[~lost].groupby(["source", "target"], sort=False):
            title = f"{experiment}: {source or 'source'} → {target or 'target'}"
            yield title, (pd.concat([some, runs[lost]]) if first and lost.any() else some)
            first = False
        if first:
            yield str(experiment), runs


def domain_keys(runs: pd.DataFrame) -> dict[str, str]:
    """Keys of the domains in metric names, with their roles, targets first: ``{"target": "target", ...}``."""
    roles = {name: role for domains in runs["domains"] for role, names in domains.items() for name in names}
    found = {c.split("/")[0]: None for c in runs.columns if c.count("/") == 2 and c.split("/")[1] == "test"}
    keys = {key: key if key in ("source", "target") else roles.get(key, "eval") for key in found}
    order = {"target": 0, "source": 1, "eval": 2}
    return dict(sorted(keys.items(), key=lambda item: order.get(item[1], 2)))


def primary_of(runs: pd.DataFrame, key: str) -> str:
    """Name of the primary metric of a domain: as the runs say, else ``accuracy``, or ``mae`` where there is none."""
    for primary in runs["primary"]:
        if key in primary:
            return str(primary[key])
    return "accuracy" if f"{key}/test/accuracy" in runs.columns else "mae"


def after_key(runs: pd.DataFrame, key: str) -> str:
    """Column of a domain's primary metric on the test split after fine-tuning."""
    return f"{key}/test/{primary_of(runs, key)}"


def headline(runs: pd.DataFrame) -> list[str]:
    """The columns to compare by default: targets after and gained, sources after and retained, others after.

    Of sequences, the numbers of their matrix.
    """
    whole = [f"sequence/{n}" for n in ("acc", "bwt", "forgetting", "fwt", "learning_accuracy")]
    if columns := [c for c in whole if c in runs.columns and runs[c].notna().any()]:
        return columns
    for key, role in domain_keys(runs).items():
        columns += [after_key(runs, key)]
        columns += [f"{key}/{'gain' if role == 'target' else 'retention'}"] if role != "eval" else []
    return [c for c in columns if c in runs.columns and runs[c].notna().any()]


def with_baseline(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Fill in gain and retention where a domain has no "before": against arm ``baseline`` of the same seed.

    So it is for ``adapt``, whose starting model has an untrained head. Runs that have a "before" keep their own.
    """
    runs = runs.copy()
    base = runs[runs["arm"] == baseline].drop_duplicates("seed", keep="last").set_index("seed")
    for key in domain_keys(runs):
        column = after_key(runs, key)
        if column not in runs.columns:
            continue
        up = higher_is_better(column)
        measured = runs.get(f"{column}/before", pd.Series(float("nan"), index=runs.index)).notna()
        for name, function in (("gain", gain), ("retention", retention)):
            filled = [function(base[column].get(seed), after, up) for seed, after in zip(runs["seed"], runs[column])]
            own = runs.get(f"{key}/{name}", pd.Series(float("nan"), index=runs.index))
            runs[f"{key}/{name}"] = own.where(measured, pd.Series(filled, index=runs.index, dtype=float))
    return runs
