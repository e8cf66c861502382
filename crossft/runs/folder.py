"""One run folder: its paths and its ``summary.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossft.errors import ConfigError, RunError
from crossft.runs.files import read_json, write_json
from crossft.runs.identity import versions

__all__ = ["SCHEMA", "RunFolder"]

SCHEMA = 1
"""Version of ``summary.json``. It grows by new fields; the number changes when an old field changes its meaning."""

STATUSES = ("running", "finished", "failed", "interrupted", "pruned")
_EMPTY: dict[str, Any] = {
    "schema": SCHEMA,
    "status": "running",
    "experiment": None,
    "arm": None,
    "seed": None,
    "versions": {},
    "seconds": None,
    "domains": {},
    "primary": {},
    "metrics": {},
    "config_hash": None,
    "parent": None,
    "checkpoint": None,
    "selected_by": None,
    "error": None,
}


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
        self.sequence = self.path / "sequence.json"
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
        if status in ("finished", "pruned"):
            return f"{self.path} holds a {status} run; choose another folder with --run.dir, or remove this one"
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
            ConfigError: ``status`` is none of running, finished, failed, interrupted, pruned.
        """
        old = self.summary() if self.summary_file.exists() else {**_EMPTY, "metrics": {}}
        merged = {**old, **fields, "schema": SCHEMA}
        merged["metrics"] = dict(sorted({**old["metrics"], **(fields.get("metrics") or {})}.items()))
        if merged["status"] not in STATUSES:
            raise ConfigError(f"status={merged['status']!r} is not one of {', '.join(STATUSES)}; use one of these")
        write_json(self.summary_file, merged, sort_keys=False)
        return merged
