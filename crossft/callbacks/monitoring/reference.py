"""The run beside this one that it is compared with."""

from __future__ import annotations

from pathlib import Path

from crossft.errors import CrossftError
from crossft.runs import RunFolder, read_metrics

__all__ = ["reference_scores"]


def reference_scores(folder: Path, arm: str) -> dict[str, float]:
    """The last value of every ``health/`` metric of the run of this arm with the same seed and domains.

    Args:
        folder: this run's folder; the other lies beside it.
        arm: of the other run, which is finished.

    Returns:
        Empty where there is no such run.
    """
    own = RunFolder(folder)
    if not own.summary_file.is_file():
        return {}
    mine = own.summary()
    for path in sorted(folder.parent.glob("*/summary.json")):
        other = RunFolder(path.parent)
        try:
            summary = other.summary()
            same = all(summary[key] == mine[key] for key in ("seed", "domains"))
            if other.path != folder and summary["arm"] == arm and summary["status"] == "finished" and same:
                return {row.name: row.value for row in read_metrics(other.metrics) if row.name.startswith("health/")}
        except CrossftError:
            continue
    return {}
