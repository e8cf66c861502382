"""The run folder: its paths, its ``summary.json``, its ``metrics.csv``, and files written whole or not at all.

Nothing here imports torch; ``docs/run-folder.md`` describes the files for other programs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from crossft import __version__
from crossft.errors import ConfigError, RunError

__all__ = [
    "SCHEMA",
    "MetricRow",
    "MetricsCsv",
    "RunFolder",
    "config_hash",
    "higher_is_better",
    "read_json",
    "read_metrics",
    "replacing",
    "run_id",
    "versions",
    "write_atomic",
    "write_json",
]

SCHEMA = 1
"""Version of ``summary.json``. It grows by new fields; the number changes when an old field changes its meaning."""

STATUSES = ("running", "finished", "failed", "interrupted")
_ERRORS = frozenset({"mse", "mae", "calibration_error", "loss"})
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "transformers", "numpy", "wandb")


def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric is a better one; ``name`` may be a full key (``target/test/mse``)."""
    parts = [part for part in name.split("/") if part != "before"]
    return not parts or parts[-1] not in _ERRORS


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it becomes ``path``, on an error it vanishes.

    The file is flushed to the disk before the rename, and the folder after it, so that a crash at any moment leaves
    either the old file or the new one. The temporary keeps the suffix of ``path`` and starts with ``.tmp-``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path | str, obj: Any, *, sort_keys: bool = True) -> None:
    """Write ``obj`` as JSON, whole or not at all; NaN and infinities become null, paths text, tuples lists.

    Raises:
        TypeError: ``obj`` holds something JSON has no form for.
    """
    text = json.dumps(_plain(obj), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n")


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted(_plain(value) for value in obj)
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if not isinstance(obj, (str, int, bool)) and hasattr(obj, "item"):  # a 0-d array or tensor
        return _plain(obj.item())
    return obj


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}; is this the right folder?") from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it, or remove its run folder") from error


def config_hash(config: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """Hash a config: 16 hex digits, equal for equal values whatever the order of the keys.

    Args:
        config: nested plain values, as parsed from ``config.yaml``.
        ignore: keys that do not change what is trained, dotted where nested (``run.dir``, ``trainer.logger``).
    """
    kept = _without(config, frozenset(ignore))
    text = json.dumps(_plain(kept), sort_keys=True, separators=(",", ":"), default=str)
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


class RunFolder:
    """The paths of one run folder, and its summary.

    Args:
        path: the folder, ``runs/EXPERIMENT/RUN_ID``. Nothing is created or checked here: see ``create`` and ``open``.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.summary_file = self.path / "summary.json"
        self.metrics = self.path / "metrics.csv"
        self.ledger = self.path / "ledger.csv"
        self.before = self.path / "before.json"
        self.quarantine = self.path / "quarantine.json"
        self.splits = self.path / "splits.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.anchors = self.path / "anchors"
        self.wandb = self.path / "wandb"
        self.figures = self.path / "figures"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: Path | str, **fields: Any) -> RunFolder:
        """Make a new run folder with a summary whose status is ``running``; ``fields`` as in ``write_summary``.

        Of two processes that create the same folder, one succeeds.

        Raises:
            RunError: the folder holds a run already, or other files.
        """
        folder = cls(path)
        if folder.summary_file.exists() or folder.config.exists():
            raise RunError(folder._taken())
        folder.path.mkdir(parents=True, exist_ok=True)
        others = sorted(p.name for p in folder.path.iterdir() if p.name != "checkpoints")
        if others:
            raise RunError(
                f"{path} is not empty (it holds {others[0]!r}) and is not a run folder; "
                "choose another with --run.dir, or empty it"
            )
        try:
            folder.checkpoints.mkdir()
        except FileExistsError:
            raise RunError(
                f"{path} is just being started by another process, or one died before it began; "
                "if none runs, remove the folder, or choose another with --run.dir"
            ) from None
        folder.write_summary(**{"status": "running", "versions": versions(), **fields})
        return folder

    def _taken(self) -> str:
        status = self.summary().get("status") if self.summary_file.exists() else "running"
        if status == "finished":
            return f"{self.path} holds a finished run; choose another folder with --run.dir, or remove this one"
        return (
            f"{self.path} holds an unfinished run (status {status}); continue it with "
            f"`crossft resume {self.path}`, or choose another folder with --run.dir"
        )

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open an existing run folder; ``path`` may also be a checkpoint, or any file, inside it.

        Raises:
            RunError: there is no such path, or it does not lie in a run folder.
        """
        path = Path(path)
        if not path.exists():
            raise RunError(f"{path} does not exist; give a run folder (runs/EXPERIMENT/RUN) or a checkpoint inside one")
        folder = cls(path)
        if folder.summary_file.is_file() or folder.config.is_file():
            return folder
        for parent in list(path.absolute().parents)[:3]:
            if cls(parent).summary_file.is_file():
                return cls(parent)
        raise RunError(
            f"{path} is not a run folder: neither summary.json nor config.yaml lies in it; "
            "give the folder that `crossft fit` printed (runs/EXPERIMENT/RUN)"
        )

    def summary(self) -> dict[str, Any]:
        """Read ``summary.json``; fields that were never written are null.

        Raises:
            RunError: it is missing, not JSON, or of a newer schema.
        """
        found = read_json(self.summary_file)
        if not isinstance(found, dict):
            raise RunError(f"{self.summary_file} holds no JSON object; restore it, or remove its run folder")
        schema = found.get("schema", SCHEMA)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise RunError(f"{self.summary_file} has schema {schema!r}, newer than {SCHEMA}; update crossft to read it")
        return {**_EMPTY, **found, "metrics": found.get("metrics") or {}}

    def write_summary(self, **fields: Any) -> dict[str, Any]:
        """Merge ``fields`` into ``summary.json``, write it whole, and return it.

        ``metrics`` is merged key by key, every other field is replaced. Fields beyond schema 1 are kept as given.

        Raises:
            ConfigError: ``status`` is none of running, finished, failed, interrupted.
        """
        old = self.summary() if self.summary_file.exists() else {**_EMPTY, "metrics": {}}
        merged = {**old, **fields, "schema": SCHEMA}
        merged["metrics"] = dict(sorted({**old["metrics"], **(fields.get("metrics") or {})}.items()))
        if merged["status"] not in STATUSES:
            raise ConfigError(f"status={merged['status']!r} is not one of {', '.join(STATUSES)}; use one of these")
        write_json(self.summary_file, merged, sort_keys=False)
        return merged


_EMPTY: dict[str, Any] = {
    "schema": SCHEMA,
    "status": "running",
    "experiment": None,
    "arm": None,
    "seed": None,
    "versions": {},
    "seconds": None,
    "metrics": {},
    "config_hash": None,
    "parent": None,
    "checkpoint": None,
    "selected_by": None,
    "error": None,
}


class MetricRow(NamedTuple):
    """One line of ``metrics.csv``: ``step`` counts optimizer steps; ``value`` is NaN where undefined."""

    step: int
    epoch: int
    name: str
    value: float


_HEADER = ",".join(MetricRow._fields) + "\n"


class MetricsCsv:
    """Appends to ``metrics.csv``: one line a value, so that new names need no rewriting and a kill costs one line.

    A half line that a kill left at the end is cut off on opening. Use it in one process only.

    Args:
        path: the file; created with its header when missing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def _opened(self) -> TextIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(self.path)
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self._file.tell() == 0:
                self._file.write(_HEADER)
        return self._file

    def append(self, step: int, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """Write one line for each metric, in one write, and flush; None is written as NaN."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        for name, value in metrics.items():
            writer.writerow((step, epoch, name, "nan" if value is None else repr(float(value))))
        file = self._opened()
        file.write(text.getvalue())
        file.flush()

    def truncate(self, step: int) -> None:
        """Drop the rows after optimizer step ``step``, as a run that resumes there writes them again."""
        self.close()
        if self.path.exists():
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(row for row in _rows(self.path) if row.step <= step)
            write_atomic(self.path, _HEADER + text.getvalue())

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_half_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _rows(path: Path) -> Iterator[MetricRow]:
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a half last line was never finished
    for number, fields in enumerate(csv.reader(io.StringIO(whole)), 1):
        if number == 1 or not fields:
            continue
        try:
            step, epoch, name, value = fields
            yield MetricRow(int(step), int(epoch), name, float(value))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not step,epoch,name,value ({error}); remove the line") from error


def read_metrics(path: Path | str) -> list[MetricRow]:
    """Read ``metrics.csv`` in order of writing; of two rows with one step and name the later counts.

    A half last line, as a kill leaves it, is left out.

    Raises:
        RunError: the file is missing, or a line before the last is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; the run has logged nothing yet, or this is not its folder")
    latest: dict[tuple[int, str], MetricRow] = {}
    for row in _rows(path):
        latest.pop((row.step, row.name), None)
        latest[row.step, row.name] = row
    return list(latest.values())
