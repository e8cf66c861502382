"""What a run tells W&B beside its curves: its summary, its tables, and artifacts with lineage; offline as online."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from crossft.runs import RunFolder

__all__ = ["class_rows", "log_inputs", "log_outputs"]

Contents = Literal["reference", "upload", "none"]
_CLASSES = ("label", "rows", "precision", "recall", "f1")


def log_inputs(run: Any, folder: RunFolder, fingerprint: str, contents: Contents) -> None:
    """Tell W&B what the run is made from: its data, and the model of the run it starts from.

    Both are artifacts named by what they are, so that every run that uses them meets in the same one.

    Args:
        run: the W&B run.
        folder: the run folder.
        fingerprint: hash over the data's content and splits.
        contents: whether checkpoints are uploaded, referred to by their path and hash, or left out.
    """
    import wandb

    summary = folder.summary()
    data = wandb.Artifact(
        f"data-{fingerprint[:16]}", "dataset", metadata={"fingerprint": fingerprint, "domains": summary["domains"]}
    )
    if folder.splits.is_file():
        data.add_file(str(folder.splits), name="splits.json", policy="immutable")
    _use(run, data)
    parent = _parent(summary["parent"])
    if parent is not None and contents != "none":
        name = Path(parent.summary()["checkpoint"] or "last.ckpt").name
        _use(run, _model(parent, parent.checkpoints / name, contents))


def log_outputs(run: Any, folder: RunFolder, contents: Contents) -> None:
    """Tell W&B what the run came to, however it ended: summary, tables, and its checkpoints as far as they are there.

    The summary has every metric of ``summary.json`` that is defined, under its own key, as a plain number, and the
    other fields below ``crossft``.
    """
    summary = folder.summary()
    metrics = summary.pop("metrics")
    run.summary.update({key: float(value) for key, value in metrics.items() if value is not None})
    run.summary.update({"crossft": summary})
    run.log(dict(_tables(folder)))
    if contents != "none":
        for path, aliases in _checkpoints(folder).items():
            run.log_artifact(_model(folder, path, contents), aliases=aliases)


def _use(run: Any, artifact: Any) -> None:
    """Note an input, as ``use_artifact`` does. That itself refuses to work offline, and online waits for the server."""
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _parent(path: str | None) -> RunFolder | None:
    """The run folder behind ``parent``, which may name a checkpoint."""
    for place in [Path(path), *list(Path(path).parents)[:2]] if path else []:
        folder = RunFolder(place)
        if folder.summary_file.is_file():
            return folder if folder.last.exists() else None
    return None


def _checkpoints(folder: RunFolder) -> dict[Path, list[str]]:
    """Each checkpoint with its aliases; one that has several names is told once."""
    found: dict[Path, list[str]] = {}
    for path, alias in ((folder.last, "last"), (folder.best, "best")):
        if path.exists():
            same = next((other for other in found if other.samefile(path)), path)
            found.setdefault(same, []).append(alias)
    return found


def _model(folder: RunFolder, path: Path, contents: Contents) -> Any:
    """The artifact of one checkpoint: equal for all who make it of the same file."""
    import wandb

    summary = folder.summary()
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{summary['experiment']}-{folder.path.name}")[:120]
    kept = ("experiment", "arm", "seed", "status", "config_hash", "selected_by", "parent")
    artifact = wandb.Artifact(name, "model", metadata={key: summary[key] for key in kept})
    if contents == "reference":
        artifact.add_reference(path.absolute().as_uri(), name=path.name)
    elif path.is_dir():
        artifact.add_dir(str(path), name=path.name, policy="immutable")
    else:
        artifact.add_file(str(path), name=path.name, policy="immutable")
    return artifact


def _tables(folder: RunFolder) -> Iterator[tuple[str, Any]]:
    """``ledger``, and for each tested domain ``confusion/DOMAIN`` and ``classes/DOMAIN``."""
    if folder.ledger.is_file():
        head, *rows = _read(folder.ledger)
        yield "ledger", _table(head, [[_plain(value) for value in row] for row in rows])
    for path in sorted((folder.path / "confusion").glob("*.csv")):
        head, *rows = _read(path)
        counts = [[row[0], *map(int, row[1:])] for row in rows]
        yield f"confusion/{path.stem}", _table(head, counts)
        yield f"classes/{path.stem}", _table(_CLASSES, class_rows(head, counts))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=[*columns], data=[*rows])


def class_rows(head: Sequence[str], counts: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Label, number of true rows, precision, recall and F1 of each class, from a table in ``confusion/``.

    None where a score is undefined: no row of the class, or none predicted as it.
    """
    found = []
    for index, (label, *row) in enumerate(counts):
        if head[0] == "label":
            named: Mapping[str, int] = dict(zip(head[1:], row))
            hit, true, predicted = named["tp"], named["tp"] + named["fn"], named["tp"] + named["fp"]
        else:
            hit, true, predicted = row[index], sum(row), sum(other[index + 1] for other in counts)
        precision, recall = (hit / n if n else None for n in (predicted, true))
        f1 = 2 * hit / (true + predicted) if true + predicted else None
        found.append([label, true, precision, recall, f1])
    return found


def _read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if row]


def _plain(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
