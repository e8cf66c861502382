"""``crossft compare RUN...``: reads run folders or a W&B project, imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from rich.console import Console

from crossft.errors import ConfigError
from crossft.runs import write_atomic

__all__ = ["run"]

_RUNS = "run folders, or folders that hold some (runs/EXPERIMENT), or a W&B project: wandb:ENTITY/PROJECT"
_FORMATS: dict[str, Literal["markdown", "latex", "csv"]] = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def run(command: str, arguments: list[str]) -> int:
    """Print one table for each experiment, source and target, and one over all of them where there are several."""
    parser = argparse.ArgumentParser(
        "crossft compare",
        description="Put runs side by side: mean over seeds with 95 % intervals, and tests against a baseline.",
    )
    parser.add_argument("runs", nargs="+", help=_RUNS)
    parser.add_argument("--baseline", help="the arm the others are compared with")
    parser.add_argument("--metrics", nargs="+", help="columns, as in summary.json; default: the headline metrics")
    parser.add_argument("--output", type=Path, help="also write the tables: .md, .tex, .csv, or a page: .html")
    options = parser.parse_args(arguments)
    output: Path | None = options.output
    if output is not None and output.suffix not in (*_FORMATS, ".html"):
        raise ConfigError(f"--output={output}: choose an ending among {', '.join(_FORMATS)}, .html")
    from crossft.reports.overall import overall
    from crossft.reports.records import read_records
    from crossft.reports.tables import compare, text_of

    records = read_records(options.runs)
    tables = compare(records, options.baseline, options.metrics)
    tables += overall(records, options.baseline, options.metrics)
    console = Console(highlight=False)
    for table in tables:
        console.print(table.rich())
        console.print(table.rich_statistics())
    if output is not None:
        if output.suffix == ".html":
            from crossft.reports.page import write_page

            write_page(options.runs, output, baseline=options.baseline, metrics=options.metrics)
        else:
            write_atomic(output, text_of(tables, _FORMATS[output.suffix]))
        print(f"written: {output}")
    return 0
