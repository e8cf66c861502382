"""Run folders for the tests of the reports, written by the same code that runs write them with."""

import math
from pathlib import Path
from typing import Any

from crossft.runs import MetricsCsv, RunFolder, gain, retention, run_id


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
