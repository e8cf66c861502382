"""What a leg leaves behind: its final metrics, confusion matrices, calibration, and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console
from torch import Tensor

from crossft.errors import RunError
from crossft.metrics import primary_metric
from crossft.reports.figures import learning_curves
from crossft.reports.final import final_table
from crossft.runs import RunFolder, gain, higher_is_better, retention, write_atomic
from crossft.tasks.evaluation import display_names
from crossft.types import Domain

__all__ = ["final_metrics", "finish", "primary_of", "write_calibrations", "write_confusions"]


def primary_of(domains: Sequence[Domain]) -> dict[str, str]:
    """The primary metric of each domain, by the domain's key in metric names."""
    names = display_names(domains)
    return {names[d.name]: primary_metric(d.kind).name for d in domains}


def final_metrics(
    domains: Sequence[Domain], before: Mapping[str, float | None], after: Mapping[str, float], measured: bool = True
) -> dict[str, float | None]:
    """The ``metrics`` of ``summary.json``.

    Args:
        domains: the run's domains.
        before: ``DOMAIN/test/METRIC`` of the starting model, as far as its heads were trained.
        after: the same of the model chosen.
        measured: whether "before" was measured at all; where it was not, nothing is said of it.

    Returns:
        after, ``.../before`` (null where the head was untrained), retention of sources and eval domains, gain of all.
    """
    found: dict[str, float | None] = dict(after)
    if not measured:
        return found
    found |= {f"{key}/before": before.get(key) for key in after}
    names, primary = display_names(domains), primary_of(domains)
    for domain in domains:
        name = names[domain.name]
        key = f"{name}/test/{primary[name]}"
        if key not in after:
            continue
        higher = higher_is_better(key)
        found[f"{name}/gain"] = gain(before.get(key), after[key], higher)
        if domain.role != "target":
            found[f"{name}/retention"] = retention(before.get(key), after[key], higher)
    return found


def write_confusions(folder: RunFolder, matrices: Mapping[str, Tensor], domains: Sequence[Domain]) -> None:
    """Write each domain's confusion matrix as ``confusion/DOMAIN.csv``: rows are true labels, columns predicted.

    A multilabel matrix [c, 2, 2] becomes one row a label: true negatives, false positives, false negatives, true
    positives.
    """
    labels = {d.name: d.labels for d in domains}
    for name, matrix in matrices.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if matrix.ndim == 3:
            writer.writerow(["label", "tn", "fp", "fn", "tp"])
        else:
            writer.writerow(["true", *labels[name]])
        for label, row in zip(labels[name], matrix, strict=True):
            writer.writerow([label, *(int(v) for v in row.flatten().tolist())])
        write_atomic(folder.path / "confusion" / f"{name}.csv", text.getvalue())


def write_calibrations(folder: RunFolder, bins: Mapping[str, Tensor]) -> None:
    """Write each domain's reliability as ``calibration/DOMAIN.csv``, one line a bin of the confidence (low, high].

    Columns: ``low``, ``high``, ``rows``, and over these the mean ``confidence`` and ``accuracy``; empty without rows.
    For multilabel domains a row is one decision on one label, and accuracy is how often the label is true.

    Args:
        folder: the run folder.
        bins: by domain, [3, n_bins]: rows, sums of confidences, sums of outcomes.
    """
    for name, counted in bins.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["low", "high", "rows", "confidence", "accuracy"])
        number = counted.shape[1]
        for place, (rows, confidence, outcome) in enumerate(counted.double().T.tolist()):
            means = [confidence / rows, outcome / rows] if rows else ["", ""]
            writer.writerow([place / number, (place + 1) / number, int(rows), *means])
        write_atomic(folder.path / "calibration" / f"{name}.csv", text.getvalue())


def finish(folder: RunFolder) -> None:
    """Draw the learning curves, print the final table, and say where the run's files lie."""
    with suppress(RunError):  # a fit of no step has nothing to draw
        learning_curves(folder.path)
    Console(highlight=False).print(final_table(folder.summary()))
    print(f"run folder: {folder.path}")
