"""The run folder: its paths, its ``summary.json``, its ``metrics.csv``, and files written whole or not at all.

Nothing here imports torch; ``docs/run-folder.md`` describes the files for other programs.
"""

from crossft.runs.caches import (
    StoredPrefix,
    allocated,
    cache_folder,
    prefix_folder,
    remove_prefixes,
    stored_prefixes,
)
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
    "StoredPrefix",
    "allocated",
    "cache_folder",
    "config_hash",
    "gain",
    "higher_is_better",
    "prefix_folder",
    "read_json",
    "read_metrics",
    "remove_prefixes",
    "replacing",
    "retention",
    "run_id",
    "stored_prefixes",
    "versions",
    "write_atomic",
    "write_json",
]
