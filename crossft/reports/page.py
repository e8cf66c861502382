"""One self-contained HTML page of an experiment: its arms, its runs, its pictures. It asks the network for nothing."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from urllib.parse import quote

import pandas as pd

from crossft import __version__
from crossft.errors import RunError
from crossft.reports.figures import tradeoff
from crossft.reports.overall import overall
from crossft.reports.records import groups, headline, leaves, read_records, with_baseline
from crossft.reports.tables import ArmTable, compare, label
from crossft.runs import RunFolder, write_atomic

__all__ = ["write_page"]

_MOST_CURVES = 24
_TEXT = ("run", "arm", "source", "target", "status")


def write_page(
    paths: Sequence[Path | str], out: Path | str, *, title: str | None = None, baseline: str | None = None
) -> Path:
    """Write the page of all runs below ``paths``; links to run folders are relative to the page.

    Args:
        paths: run folders, or folders that hold some (``runs/EXPERIMENT``).
        out: the HTML file to write.
        title: heading; by default the names of the experiments.
        baseline: the arm that the others are compared with, or None.

    Returns:
        The page's path.

    Raises:
        RunError: a path does not exist, or holds no run.
        ConfigError: no run belongs to ``baseline``.
    """
    records, out = read_records(paths), Path(out)
    finished = int((records["status"] == "finished").sum())
    names = ", ".join(dict.fromkeys(records["experiment"]))
    html = Template(resources.files("crossft.reports").joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title or names),
        lead=escape(f"{len(records)} runs, {finished} finished. Written by crossft {__version__}."),
        groups="\n".join(_groups(records, baseline)),
        runs=_runs(records, out.absolute().parent),
        curves=_curves(records, out.absolute().parent),
    )
    write_atomic(out, html)
    return out


def _groups(records: pd.DataFrame, baseline: str | None) -> Iterable[str]:
    compared = leaves(records)
    for table in overall(records, baseline):
        yield f"<h2>{escape(table.title)}</h2>"
        yield _arms(table)
        yield from (f"<p>{escape(note)}</p>" for note in table.notes)
    for table, (title, runs) in zip(compare(records, baseline), groups(compared)):
        yield f"<h2>{escape(title)}</h2>"
        yield _arms(table)
        yield from (f"<p>{escape(note)}</p>" for note in table.notes)
        finished = runs[runs["status"] == "finished"]
        yield _tradeoff(with_baseline(finished, table.baseline) if table.baseline else finished)


def _arms(table: ArmTable) -> str:
    heads = [(head, i < 2) for i, head in enumerate(table.heads())]
    rows = []
    for (arm, runs), text in zip(table.runs.items(), table.rows()):
        values = [arm, runs, *(table.cells[arm, m].value.mean for m in table.metrics)]
        rows.append([_cell(value, shown) for value, shown in zip(values, text)])
    return _table(heads, rows)


def _runs(records: pd.DataFrame, here: Path) -> str:
    metrics = headline(records)
    texts = [t for t in _TEXT if t not in ("source", "target") or records.loc[records[t] != "", t].nunique() > 1]
    failed = records["error"].notna().any()
    heads = [(t, True) for t in texts] + [(t, False) for t in ("seed", "seconds", *map(label, metrics))]
    heads += [("error", True)] if failed else []
    rows = []
    for record in records.to_dict("records"):
        link = quote(os.path.relpath(Path(record["path"]).absolute(), here))
        cells = [_cell(str(record[t]), str(record[t])) for t in texts]
        cells[0] = f'<td class="text"><a href="{escape(link)}">{escape(str(record["run"]))}</a></td>'
        cells += [_cell(record[n], _number(record[n], n)) for n in ("seed", "seconds", *metrics)]
        cells += [f'<td class="text bad">{escape(str(record["error"] or ""))}</td>'] if failed else []
        rows.append(cells)
    return _table(heads, rows)


def _number(value: float | None, name: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if name == "seed" else f"{value:.1f}" if name == "seconds" else f"{value:.4f}"


def _cell(value: object, shown: str) -> str:
    if isinstance(value, str):
        return f'<td class="text">{escape(shown)}</td>'
    key = "" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value}"
    return f'<td data-value="{key}">{escape(shown)}</td>'


def _table(heads: list[tuple[str, bool]], rows: list[list[str]]) -> str:
    top = "".join(f"<th{' class=text' if text else ''}><button>{escape(h)}</button></th>" for h, text in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _tradeoff(runs: pd.DataFrame) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            light = _embedded(tradeoff(runs, Path(folder) / "light.png"))
            dark = _embedded(tradeoff(runs, Path(folder) / "dark.png", dark=True))
        except RunError as error:
            return f"<p>No picture: {escape(str(error))}.</p>"
    words = "Target after fine-tuning against source retention, one point an arm"
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<picture>{source}<img src="{light}" alt="{words}"></picture>'


def _curves(records: pd.DataFrame, here: Path) -> str:
    pictures = [
        (run, RunFolder(path).figures / "learning_curves.png") for run, path in records[["run", "path"]].to_numpy()
    ]
    found = [(str(run), picture) for run, picture in pictures if picture.is_file()]
    if not found:
        return ""
    blocks = ["<h2>Learning curves</h2>"]
    for run, picture in found[:_MOST_CURVES]:
        image = f'<img loading="lazy" src="{_embedded(picture)}" alt="Learning curves of {escape(run)}">'
        blocks.append(f"<details><summary>{escape(run)}</summary>{image}</details>")
    if len(found) > _MOST_CURVES:
        links = (
            f'<a href="{escape(quote(os.path.relpath(picture.absolute(), here)))}">{escape(run)}</a>'
            for run, picture in found[_MOST_CURVES:]
        )
        blocks.append(f"<p>More, in their folders: {', '.join(links)}</p>")
    return "\n".join(blocks)


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
