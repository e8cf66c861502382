"""Run folders for the tests of the reports, written by the same code that runs write them with."""

import csv
import math
from pathlib import Path
from typing import Any

import yaml

from crossft.runs import MetricsCsv, RunFolder, gain, retention, run_id, write_json


def write_run(
    root: Path, arm: str, seed: int, target: float | None = 0.8, source: float | None = 0.9, **fields: Any
) -> RunFolder:
    """A finished run of photo -> sketch; accuracy before is 0.5 on the target and 1.0 on the source."""
    folder = RunFolder.create(root / run_id(arm, seed, "abcdef12"), experiment=root.name, arm=arm, seed=seed)
    metrics: dict[str, float | None] = {}
    for key, before, after in (("target", 0.5, target), ("source", 1.0, source)):
        if after is not None:
            metrics |= {f"{key}/test/accuracy": after, f"{key}/test/accuracy/before": before}
            metrics |= {f"{key}/gain": gain(before, after), f"{key}/retention": retention(before, after)}
    fields = {"status": "finished", "seconds": 1.5, "metrics": metrics, **fields}
    domains = {"source": ["photo"], "target": ["sketch"]}
    folder.write_summary(**{"domains": domains, "primary": {"source": "accuracy", "target": "accuracy"}, **fields})
    return folder


def write_curves(folder: RunFolder, steps: int = 100) -> None:
    log = MetricsCsv(folder.metrics)
    for step in range(steps):
        row = {"train/loss": 2 * math.exp(-step / 30), "term/dann/weighted": 0.5, "lr-AdamW/head": 1e-3}
        if step % 25 == 24:
            row |= {"target/val/accuracy": step / 200, "source/val/accuracy": 0.9, "target/val/loss": math.nan}
        log.append(step, step // 25, row)
    log.close()


def write_details(folder: RunFolder, weight: float | None = None, shift: float = 0.0) -> None:
    """What the page shows beyond the summary: two phases, bins of two domains, and a config with one method or none.

    ``shift`` moves the accuracy of the bins; confidence is 0.3, 0.5 and 0.9 in bins 5, 8 and 14 of 15.
    """
    columns = ("phase", "step", "stage", "parameters", "trainable", "lr", "weight_decay", "mode", "batchnorm")
    rows = [
        (0, 0, "stem", 10, 0, 0.001, 0.01, "frozen", "frozen"), (0, 0, "head", 5, 5, 0.01, 0.01, "train", ""),
        (1, 50, "stem", 10, 10, 0.0001, 0.01, "train", "frozen"), (1, 50, "head", 5, 5, 0.001, 0.01, "train", ""),
    ]  # fmt: skip
    _write_csv(folder.ledger, columns, rows)
    bins: list[tuple[object, ...]] = [(i / 15, (i + 1) / 15, 0, "", "") for i in range(15)]
    for place, confidence, number in ((4, 0.3, 10), (7, 0.5, 20), (13, 0.9, 70)):
        bins[place] = (place / 15, (place + 1) / 15, number, confidence, confidence - 0.1 + shift)
    folder.path.joinpath("calibration").mkdir()
    for name in ("photo", "sketch"):
        _write_csv(folder.path / "calibration" / f"{name}.csv", ("low", "high", "rows", "confidence", "accuracy"), bins)
    method = {"class_path": "crossft.callbacks.retention.L2SP", "init_args": {"weight": weight, "start": None}}
    summary = folder.summary()
    config = {"experiment": "pacs", "arm": summary["arm"], "seed_everything": summary["seed"], "data": {"shots": 10}}
    folder.config.write_text(yaml.safe_dump({**config, "methods": {} if weight is None else {"l2sp": method}}))


def write_sequence(folder: RunFolder, shift: float = 0.0) -> None:
    """Photo, art, sketch: 0.9 on the domain just learned, 0.1 less a step later; not measured once."""
    matrix = [[0.9, 0.4, 0.3], [0.7, 0.8, None], [0.6, 0.7, 0.9]]
    shifted = [[None if v is None else v + shift for v in row] for row in matrix]
    write_json(folder.sequence, {"domains": ["photo", "art", "sketch"], "metric": "accuracy", "matrix": shifted})


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
