"""One self-contained HTML page of an experiment: its arms, its charts, its runs. It asks the network for nothing.

Charts are SVG (``charts``) over what run folders hold (``details``); the script sorts, filters and highlights only, so
that the page shows everything without it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
import pandas as pd

from crossft import __version__
from crossft.reports import charts, details
from crossft.reports.frontier import tradeoff_of
from crossft.reports.overall import overall
from crossft.reports.records import groups, headline, leaves, read_records, with_baseline
from crossft.reports.tables import METHODS, ArmTable, compare, counted, label
from crossft.runs import higher_is_better, write_atomic

__all__ = ["write_page"]

_TEXT = ("run", "arm", "source", "target", "status")
_MOST_KEYS = 24
"""Config keys as columns; more are rows below."""
Numbers = Mapping[str, int]


def write_page(
    paths: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
) -> Path:
    """Write the page of all runs below ``paths``; links to run folders are relative to the page.

    Args:
        paths: run folders, or folders that hold some (``runs/EXPERIMENT``), or ``wandb:ENTITY/PROJECT``, whose runs
            have no curves, calibration, ledgers and configs here.
        out: the HTML file to write.
        title: heading; by default the names of the experiments.
        baseline: the arm that the others are compared with, or None.
        metrics: keys of the columns; by default the headline.

    Returns:
        The page's path.

    Raises:
        RunError: a path does not exist, or holds no run.
        ConfigError: no run belongs to ``baseline``.
    """
    records, out = read_records(paths), Path(out)
    number = {str(arm): i for i, arm in enumerate(dict.fromkeys(leaves(records)["arm"]))}
    finished = int((records["status"] == "finished").sum())
    names = ", ".join(dict.fromkeys(records["experiment"]))
    sections = [*_over_tasks(records, baseline, metrics, number), *_groups(records, baseline, metrics, number)]
    html = Template(_text("page.html")).substitute(
        title=escape(title or names),
        lead=escape(f"{len(records)} runs, {finished} finished. Written by crossft {__version__}."),
        style=_text("page.css").strip(),
        script=_text("page.js").strip(),
        contents=_contents([heading for heading, _ in sections]),
        arms=_chips(number),
        groups="\n".join(_section(i, heading, body) for i, (heading, body) in enumerate(sections)),
        runs=_runs(records, out.absolute().parent, number),
    )
    write_atomic(out, html)
    return out


def _text(name: str) -> str:
    return resources.files("crossft.reports").joinpath(name).read_text("utf-8")


def _contents(headings: Sequence[str]) -> str:
    if len(headings) < 2:
        return ""
    links = "".join(f'<a href="#g{i}">{escape(h)}</a>' for i, h in enumerate(headings))
    return f'<nav class="contents" aria-label="contents">{links}<a href="#runs">Runs</a></nav>'


def _chips(number: Numbers) -> str:
    chips = "".join(
        f'<button type="button" class="chip" data-arm="{i}" aria-pressed="true">{_sign(i)}{escape(arm)}</button>'
        for arm, i in number.items()
    )
    return f'<nav class="arms" aria-label="arms"><button type="button" class="chip all">hide all</button>{chips}</nav>'


def _sign(arm: int) -> str:
    return f'<svg viewBox="-6 -6 12 12" class="c{arm % 8}" aria-hidden="true"><path d="{charts.mark(arm)}"/></svg>'


def _section(place: int, heading: str, body: str) -> str:
    return f'<section id="g{place}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>'


def _over_tasks(
    records: pd.DataFrame, baseline: str | None, metrics: Sequence[str] | None, number: Numbers
) -> Iterator[tuple[str, str]]:
    for table in overall(records, baseline, metrics):
        yield (
            table.title,
            f"{_arms(table, number)}\n{_cards(_intervals(table, {}, number))}\n{_statistics(table, number)}",
        )


def _groups(
    records: pd.DataFrame, baseline: str | None, metrics: Sequence[str] | None, number: Numbers
) -> Iterator[tuple[str, str]]:
    compared = leaves(records)
    for table, (title, runs) in zip(compare(records, baseline, metrics), groups(compared)):
        finished = counted(runs)
        filled = with_baseline(finished, table.baseline) if table.baseline else finished
        cards = [*_tradeoff(filled, number), *_intervals(table, _seeds(filled, table.metrics), number)]
        cards += _curves(finished, number) + _reliability(finished, number)
        yield (
            title,
            "\n".join([_arms(table, number), _cards(cards), _statistics(table, number), *_setup(finished, number)]),
        )


def _seeds(runs: pd.DataFrame, metrics: Iterable[str]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Each seed's value by arm and metric."""
    return {
        (str(arm), metric): tuple(some[metric].dropna())
        for arm, some in runs.groupby("arm", sort=False)
        for metric in metrics
        if metric in some
    }


# -- charts ---------------------------------------------------------------------------------------------------------


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(title: str, chart: str, note: str, tall: bool = False) -> str:
    kind = ' class="tall"' if tall else ""
    return f"<figure{kind}><figcaption>{escape(title)}</figcaption>{chart}<p>{escape(note)}</p></figure>"


def _tradeoff(runs: pd.DataFrame, number: Numbers) -> list[str]:
    found = tradeoff_of(runs)
    if found is None:
        return []
    note = "The line joins the arms that no other arm beats in both (Pareto front)."
    if any(x.n > 1 for x, _ in found.points.values()):
        note += " Bars: 95 % intervals over seeds, cut at the frame."
    title = "Target gain against source retention"
    return [_card(title, charts.scatter(found, number), note, tall=True)]


def _intervals(table: ArmTable, seeds: Mapping[tuple[str, str], tuple[float, ...]], number: Numbers) -> list[str]:
    cards = []
    for metric in table.metrics:
        rows = []
        for arm in table.runs:
            cell = table.cells[arm, metric]
            sign = {True: "▲", False: "▼", None: ""}[cell.better]
            if cell.value.n:
                rows.append(charts.Row(arm, cell.value, seeds.get((arm, metric), ()), sign))
        if not rows:
            continue
        reference = table.cells[table.baseline, metric].value.mean if table.baseline else None
        note = "Mean and 95 % interval" + (", a faint dot a seed." if seeds else ".")
        note += f" Dashed: {table.baseline}." if table.baseline else ""
        title = label(metric)
        cards.append(
            _card(f"{title[0].upper()}{title[1:]} by arm", charts.intervals(title, rows, number, reference), note)
        )
    return cards


def _curves(runs: pd.DataFrame, number: Numbers) -> list[str]:
    note = "Mean over seeds; the band reaches from the lowest to the highest seed."
    return [
        _card(f"Learning curves: {title}", charts.curves(title, found, number), note)
        for title, found in details.learning_curves(runs).items()
    ]


def _reliability(runs: pd.DataFrame, number: Numbers) -> list[str]:
    note = "Final test, all seeds, in bins of the confidence; a dot's area is its share of the rows. Dashed: perfect."
    return [
        _card(f"Calibration: {name}", charts.reliability(name, found, number), note)
        for name, found in details.reliabilities(runs).items()
    ]


# -- tables ---------------------------------------------------------------------------------------------------------


def _arms(table: ArmTable, number: Numbers) -> str:
    heads = [(head, i < 2) for i, head in enumerate(table.heads())]
    rows = []
    for (arm, runs), text in zip(table.runs.items(), table.rows()):
        values = [arm, runs, *(table.cells[arm, m].value.mean for m in table.metrics)]
        cells = [_cell(value, shown) for value, shown in zip(values, text)]
        rows.append((number.get(arm), [_named(number.get(arm), text[0]), *cells[1:]]))
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return _table(heads, rows, "arms") + notes


def _statistics(table: ArmTable, number: Numbers) -> str:
    heads = [(head, i < 2) for i, head in enumerate(table.statistics_heads())]
    rows = []
    for metric, arm, *texts in table.statistics():
        cells = [f'<td class="text">{escape(metric)}</td>', _named(number.get(arm), arm)]
        cells += [_cell(_float(text), text) for text in texts]
        rows.append((number.get(arm), cells))
    return _folded(
        "Statistics: differences, tests, effect sizes" if table.baseline else "Statistics",
        _table(heads, rows, "statistics"),
        METHODS,
    )


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _folded(heading: str, body: str, note: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{body}<p>{escape(note)}</p></details>"


def _setup(runs: pd.DataFrame, number: Numbers) -> Iterator[str]:
    """The matrices of sequences, what the arms differ in, and what trained in each phase."""
    matrices = details.transfer_matrices(runs)
    if matrices:
        note = "Rows: after learning this domain; columns: test value on that domain, mean over seeds; — not measured."
        note += " Framed: the domain just learned. Below the frames is what was kept, above them what transferred."
        yield (
            "<h3>Accuracy matrix of the sequence</h3>"
            f'<div class="ledgers">{"".join(map(_matrix, matrices))}</div><p>{escape(note)}</p>'
        )
    keys, values = details.config_differences(runs)
    if keys:
        heads = [("arm", True), *((key, True) for key in keys)]
        rows = []
        for arm, own in values.items():
            cells = [f'<td class="text">{escape(own.get(key, "—"))}</td>' for key in keys]
            rows.append((number.get(arm), [_named(number.get(arm), arm), *cells]))
        note = "The keys of the config in which arms differ, as resolved; — where an arm has no such key."
        yield _folded(f"Config differences ({len(keys)} keys)", _table(heads, rows, "configs"), note)
    found = details.ledgers(runs)
    if found:
        note = "Learning rate at the start of each phase, stages from output to input; hatched: frozen."
        yield _folded(
            "Learning rate and trainability by phase",
            f'<div class="ledgers">{"".join(map(_ledger, found))}</div>',
            note,
        )


def _matrix(found: details.TransferMatrix) -> str:
    known = found.values[np.isfinite(found.values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.domains)
    lines = []
    for i, learned in enumerate(found.domains):
        cells = []
        for j, value in enumerate(map(float, found.values[i])):
            if math.isnan(value):
                cells.append("<td>—</td>")
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            share = share if higher_is_better(found.metric) else 1.0 - share
            just = ' class="just"' if i == j else ""
            cells.append(f'<td{just} style="--h:{12 + 33 * share:.0f}">{value:.3f}</td>')
        lines.append(f'<tr><th scope="row">{escape(learned)}</th>{"".join(cells)}</tr>')
    head = f"{found.arm}: {found.metric}, {found.seeds} {'seed' if found.seeds == 1 else 'seeds'}"
    table = (
        f'<table class="ledger matrix"><thead><tr><th></th>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    return f'<div><h3>{escape(head)}</h3><div class="wide">{table}</div></div>'


def _ledger(ledger: details.Ledger) -> str:
    phases = list(dict.fromkeys((row["phase"], row["step"]) for row in ledger.rows))
    stages = list(dict.fromkeys(row["stage"] for row in ledger.rows))[::-1]
    cells = {(row["phase"], row["stage"]): row for row in ledger.rows}
    rates = [float(row["lr"]) for row in ledger.rows if row["mode"] != "frozen" and float(row["lr"]) > 0]
    top = "".join(f"<th>phase {escape(phase)}<br>from step {escape(step)}</th>" for phase, step in phases)
    lines = []
    for stage in stages:
        line = "".join(_ledger_cell(cells.get((phase, stage)), rates) for phase, _ in phases)
        lines.append(f'<tr><th scope="row">{escape(stage)}</th>{line}</tr>')
    more = " (of the first seed; phases of other seeds differ)" if ledger.differs else ""
    table = f'<table class="ledger"><thead><tr><th></th>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div><h3>{escape(", ".join(ledger.arms))}{more}</h3><div class="wide">{table}</div></div>'


def _ledger_cell(row: Mapping[str, str] | None, rates: Sequence[float]) -> str:
    if row is None:
        return "<td></td>"
    names = ("stage", "parameters", "trainable", "weight_decay", "mode", "batchnorm")
    tip = escape("\n".join(f"{name.replace('_', ' ')}: {row[name]}" for name in names if row.get(name)))
    if row["mode"] == "frozen":
        return f'<td class="frozen" data-tip="{tip}">frozen</td>'
    rate, (low, high) = float(row["lr"]), (min(rates, default=1.0), max(rates, default=1.0))
    share = math.log(rate / low) / math.log(high / low) if rate > 0 and high > low else 1.0
    return f'<td style="--h:{12 + 33 * share:.0f}" data-tip="{tip}">{rate:.1e}</td>'


def _runs(records: pd.DataFrame, here: Path, number: Numbers) -> str:
    metrics = headline(records)
    texts = [t for t in _TEXT if t not in ("source", "target") or records.loc[records[t] != "", t].nunique() > 1]
    failed = records["error"].notna().any()
    heads = [(t, True) for t in texts] + [(t, False) for t in ("seed", "seconds", *map(label, metrics))]
    heads += [("error", True)] if failed else []
    rows = []
    for record in records.to_dict("records"):
        cells = [_cell(str(record[t]), str(record[t])) for t in texts]
        link = escape(_link(str(record["path"]), here))
        cells[0] = f'<td class="text name"><a href="{link}">{escape(str(record["run"]))}</a></td>'
        cells[1] = _named(number.get(str(record["arm"])), str(record["arm"]))
        cells += [_cell(record[n], _number(record[n], n)) for n in ("seed", "seconds", *metrics)]
        cells += [f'<td class="text bad">{escape(str(record["error"] or ""))}</td>'] if failed else []
        rows.append((number.get(str(record["arm"])), cells))
    return _table(heads, rows, "runs")


def _link(path: str, here: Path) -> str:
    return path if path.startswith(("https://", "http://")) else quote(os.path.relpath(Path(path).absolute(), here))


def _number(value: float | None, name: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if name == "seed" else f"{value:.1f}" if name == "seconds" else f"{value:.4f}"


def _cell(value: object, shown: str) -> str:
    if isinstance(value, str):
        return f'<td class="text">{escape(shown)}</td>'
    key = "" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value}"
    return f'<td data-value="{key}">{escape(shown)}</td>'


def _named(arm: int | None, shown: str) -> str:
    return f'<td class="text name">{"" if arm is None else _sign(arm)}{escape(shown)}</td>'


def _table(heads: Sequence[tuple[str, bool]], rows: Sequence[tuple[int | None, Sequence[str]]], name: str) -> str:
    """A table that sorts and filters; each row with the number of its arm, where it has one."""
    top = "".join(
        f'<th scope="col"{" class=text" if text else ""}><button type="button">{escape(h)}</button></th>'
        for h, text in heads
    )
    lines = (f"<tr{'' if arm is None else f' data-arm={arm}'}>{''.join(cells)}</tr>" for arm, cells in rows)
    field = f'<input type="search" placeholder="filter {name}" aria-label="filter {name}: rows that hold all words">'
    table = f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
    tools = f'<div class="tools">{field}<output></output></div>'
    return f'<div class="table {name}">{tools}<div class="wide">{table}</div></div>'
