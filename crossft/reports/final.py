"""The final table of one run: every domain before and after, gain and retention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from crossft.reports.tables import label
from crossft.runs import gain, higher_is_better, retention

__all__ = ["FinalRow", "final_rows", "final_table"]


class FinalRow(NamedTuple):
    """One metric of one domain; None where a value is not defined."""

    domain: str
    metric: str
    before: float | None
    after: float | None
    gain: float | None
    retention: float | None


def final_rows(summary: Mapping[str, Any], *, every: bool = False) -> list[FinalRow]:
    """Rows of the final table, targets first.

    Args:
        summary: as in ``summary.json``.
        every: all metrics of the test splits instead of the primary one of each domain.
    """
    metrics, primary = summary["metrics"], summary.get("primary") or {}
    order = {"target": 0, "source": 1}
    found = [k.split("/") for k in metrics if k.count("/") == 2 and k.split("/")[1] == "test"]
    keys = sorted(dict.fromkeys(key for key, _, _ in found), key=lambda k: order.get(k, 2))
    rows: list[FinalRow] = []
    for key in keys:
        names = [name for k, _, name in found if k == key]
        first = primary.get(key, "accuracy" if "accuracy" in names else "mae")
        shown = [first, *(n for n in names if n != first)] if every else [first]
        for name in [n for n in shown if n in names]:
            before, after = metrics.get(f"{key}/test/{name}/before"), metrics[f"{key}/test/{name}"]
            up = higher_is_better(name)
            rows.append(FinalRow(key, name, before, after, gain(before, after, up), retention(before, after, up)))
    return rows


def final_table(summary: Mapping[str, Any], *, every: bool = False) -> Table:
    """The final table of a run, for the terminal; a value that is not defined is shown as a dash.

    Args:
        summary: as in ``summary.json``.
        every: all metrics of the test splits instead of the primary one of each domain.
    """
    title = " ".join(str(summary.get(k)) for k in ("experiment", "arm") if summary.get(k))
    title += f", seed {summary['seed']}" if summary.get("seed") is not None else ""
    chosen = summary.get("selected_by")
    caption = f"checkpoint selected by {chosen}" if chosen else "the last checkpoint; gain: more is better"
    caption += "".join(f"\n{line}" for line in _oracle(summary["metrics"]))
    table = Table(title=Text(title), caption=Text(caption), box=SIMPLE_HEAD)
    names = {k: "+".join(v) for k, v in (summary.get("domains") or {}).items()}
    for head in ("domain", "metric", "before", "after", "gain", "retention"):
        table.add_column(head, justify="left" if head in ("domain", "metric") else "right")
    for key, name, before, after, gained, kept in final_rows(summary, every=every):
        domain = f"{key} ({names[key]})" if names.get(key) else key
        numbers = [_number(before), _number(after), _number(gained, sign=True), _number(kept)]
        table.add_row(Text(domain), label(name), *numbers)
    return table


def _oracle(metrics: Mapping[str, Any]) -> list[str]:
    """What a choice of the checkpoint by the targets' labels would have given, where a run reports it."""
    lines = []
    for key, best in metrics.items():
        parts = key.split("/")
        if parts[0] == "oracle" and parts[2] == "test" and best is not None:
            regret = _number(metrics.get(f"oracle/{parts[1]}/regret"))
            lines.append(f"oracle, by {parts[1]} labels: {parts[3]} {best:.3f}, regret {regret}")
    return lines


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "—"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}"
