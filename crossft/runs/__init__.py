"""The run folder: its paths, its ``summary.json``, its ``metrics.csv``, and files written whole or not at all.

Nothing here imports torch; ``docs/run-folder.md`` describes the files for other programs.
"""

from crossft.runs.files import read_json, replacing, write_atomic, write_json
from crossft.runs.folder import SCHEMA, RunFolder
from crossft.runs.identity import config_hash, run_id, versions
from crossft.runs.log import MetricRow, MetricsCsv, read_metrics
from crossft.runs.outcome import gain, higher_is_better, retention

__all__ = [
    "SCHEMA",
    "MetricRow",
    "MetricsCsv",
    "RunFolder",
    "config_hash",
    "gain",
    "higher_is_better",
    "read_json",
    "read_metrics",
    "replacing",
    "retention",
    "run_id",
    "versions",
    "write_atomic",
    "write_json",
]
