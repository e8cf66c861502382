"""``crossft test RUN`` and ``crossft validate RUN``."""

from __future__ import annotations

from crossft.cli.launch import Launch
from crossft.cli.leg import build_methods, measure
from crossft.cli.saved import Saved, open_run, read_splits, take_option
from crossft.cli.screen import print_table
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.runs import write_json

__all__ = ["prepared_like", "run"]


def run(command: str, arguments: list[str]) -> int:
    """Measure a run's model again; prints every metric, and writes them with ``--output FILE.json``."""
    arguments, output = take_option(arguments, "output")
    saved = open_run(command, arguments)
    data = prepared_like(saved, keep_splits=not any(a.startswith("--data.") for a in arguments))
    split = "test" if command == "test" else "val"
    found = measure(saved.settings, saved.task, data, split, build_methods(saved.settings))
    if Launch().first:
        rows = [[*key.split("/")[::2], f"{value:.4f}"] for key, value in sorted(found.items())]
        print_table(f"{saved.checkpoint}, {split} splits", ["domain", "metric", "value"], rows, 2)
        if output is not None:
            write_json(output, found)
    return 0


def prepared_like(saved: Saved, keep_splits: bool) -> DomainData:
    """The run's data, with its splits and, never derived again, its label spaces.

    Raises:
        ConfigError: the data's domains are not those of the run.
    """
    domains = saved.task.domains
    data: DomainData = saved.settings.build("data").data
    data.use_manifest((read_splits(saved.folder) if keep_splits else None) or {}, domains)
    data.prepare()
    if [d.name for d in data.domains] != [d.name for d in domains]:
        raise ConfigError(
            f"data: the domains {[d.name for d in data.domains]} are not the run's ({[d.name for d in domains]}); give "
            f"data of those, or start a run with --init {saved.folder.path}"
        )
    return data
