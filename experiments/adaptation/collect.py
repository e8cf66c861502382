"""Collect the sweeps: results.csv (one row a run) and the tables of the README.

python experiments/adaptation/collect.py runs/adaptation-text runs/adaptation-pacs ...

``selected`` is the target's test accuracy at the checkpoint that was chosen without its labels, ``oracle`` the best of
any validated checkpoint, ``regret`` the difference; ``regret by SCORE`` what choosing by another score would have cost.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from crossft.reports.records import leaves, read_records
from crossft.reports.stats import compare_paired, interval

HERE = Path(__file__).resolve().parent
SELECTED, ORACLE, REGRET = "target/test/accuracy", "oracle/target/test/accuracy", "oracle/target/regret"
NAMES = {SELECTED: "selected", ORACLE: "oracle", REGRET: "regret", "source/test/accuracy": "source accuracy"}
BASELINES = {"baseline/tfidf/target/test/accuracy": "TF-IDF", "baseline/frozen/target/test/accuracy": "frozen features"}
FIRST = ("source-only", "erm", "target-supervised")


def results(paths: list[str]) -> pd.DataFrame:
    """One row a finished run, source legs left out: experiment, arm, seed, source, target, then metrics."""
    runs = leaves(read_records(paths))
    for _, run in runs[runs["status"] != "finished"].iterrows():
        print(f"left out: {run['run']} is {run['status']}", file=sys.stderr)
    runs = runs[runs["status"] == "finished"].copy()
    others = {c: f"regret by {c.removeprefix(REGRET + '/')}" for c in runs.columns if c.startswith(REGRET + "/")}
    shown = {c: name for c, name in {**NAMES, **BASELINES, **others}.items() if c in runs.columns}
    runs["experiment"] = runs["experiment"].str.removeprefix("adaptation-")
    rows = runs.rename(columns=shown)[["experiment", "arm", "seed", "source", "target", *shown.values(), "seconds"]]
    return rows.sort_values(["experiment", "source", "target", "arm", "seed"])


def table(rows: pd.DataFrame) -> str:
    """Markdown: an arm a line; mean ± half of the 95 % interval over seeds, paired difference to the first arm."""
    arms = sorted(dict.fromkeys(rows["arm"]), key=lambda a: (FIRST.index(a) if a in FIRST else len(FIRST), a))
    base = rows[rows["arm"] == arms[0]].set_index("seed")["selected"].to_dict()
    lines = [f"| arm | runs | selected | minus {arms[0]} | oracle | regret |", "|---|---|---|---|---|---|"]
    for arm in arms:
        some = rows[rows["arm"] == arm]
        versus = compare_paired(some.set_index("seed")["selected"].to_dict(), base) if arm != arms[0] else None
        less = f"{100 * versus.difference.mean:+.1f} ± {100 * versus.difference.half:.1f}" if versus else ""
        cells = [_percent(list(some[c])) for c in ("selected", "oracle", "regret")]
        lines.append("| " + " | ".join([arm, str(len(some)), cells[0], less, *cells[1:]]) + " |")
    for name in (n for n in BASELINES.values() if n in rows and rows[n].notna().any()):
        lines.append(f"| {name} + logistic regression | | {_percent(list(rows[name].drop_duplicates()))} | | | |")
    return "\n".join(lines)


def selectors(rows: pd.DataFrame) -> str:
    """Markdown: mean regret of every score over all runs of a method, so over pairs, methods and seeds."""
    adapted = rows[~rows["arm"].isin(FIRST)]
    columns = [c for c in rows.columns if c == "regret" or c.startswith("regret by ")]
    found = sorted((adapted[c].mean(), c) for c in columns if adapted[c].notna().any())
    return "\n".join(["| chosen by | mean regret |", "|---|---|", *(f"| {c} | {100 * m:.1f} |" for m, c in found)])


def _percent(values: list[float]) -> str:
    found = interval(values)
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.half:.1f}" if found.n > 1 else "")


def main() -> int:
    rows = results(sys.argv[1:])
    rows.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    for (name, source, target), some in rows.groupby(["experiment", "source", "target"], sort=False):
        print(f"\n**{name}: {source} -> {target}**\n\n{table(some)}")
    print(f"\n{selectors(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
