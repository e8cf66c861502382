"""Collect the sweeps: results.csv (one row a run) and the tables of the README.

python experiments/adaptation/collect.py runs/adaptation-text runs/adaptation-pacs ...

Rows of results.csv whose runs are not among these folders stay; without a folder only the tables are printed.
``selected`` is the target's test accuracy at the checkpoint that was chosen without its labels, ``oracle`` the best of
any validated checkpoint, ``regret`` the difference; ``regret by SCORE`` what choosing by another score would have cost.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from crossft.reports.records import leaves, read_records
from crossft.reports.stats import compare_paired, interval
from crossft.runs import RunFolder
from crossft.runs.files import read_json

HERE = Path(__file__).resolve().parent
SELECTED, ORACLE, REGRET = "target/test/accuracy", "oracle/target/test/accuracy", "oracle/target/regret"
NAMES = {SELECTED: "selected", ORACLE: "oracle", REGRET: "regret", "source/test/accuracy": "source accuracy"}
BASELINES = {"baseline/tfidf/target/test/accuracy": "TF-IDF", "baseline/frozen/target/test/accuracy": "frozen features"}
SCORES = [f"target/val/{n}" for n in ("infomax", "entropy", "snd", "bnm", "dev", "iwcv", "reverse")]
SCORES += ["source/val/accuracy", "source/val/loss"]
APART = ("generalize", "text-pilot")  # the target is unseen in training; one seed that is not reported
KEY = ["experiment", "arm", "seed", "source", "target"]
BASES = {"adabn": "batch-statistics"}  # all others are compared with source-only
FIRST = ("source-only", "erm", "target-supervised")


def results(paths: list[str]) -> pd.DataFrame:
    """One row a finished run, source legs left out: experiment, arm, seed, source, target, then metrics."""
    runs = leaves(read_records(paths))
    for _, run in runs[runs["status"] != "finished"].iterrows():
        print(f"left out: {run['run']} is {run['status']}", file=sys.stderr)
    runs = runs[runs["status"] == "finished"].copy()
    same_rows(runs)
    for metric in runs["selected_by"].dropna().unique():  # summaries hold the regret of all metrics but that one
        chosen = runs["selected_by"] == metric
        runs.loc[chosen, f"{REGRET}/{metric}"] = runs.loc[chosen, REGRET]
    others = {f"{REGRET}/{name}": f"regret by {name}" for name in SCORES}
    shown = {c: name for c, name in {**NAMES, **BASELINES, **others}.items() if c in runs.columns}
    runs["experiment"] = runs["experiment"].str.removeprefix("adaptation-")
    return runs.rename(columns=shown)[[*KEY, *shown.values(), "seconds"]]


def merged(new: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``before`` that have no newer run, and ``new``."""
    both = pd.concat([before, new], ignore_index=True).drop_duplicates(KEY, keep="last")
    columns = [*KEY, *NAMES.values(), *BASELINES.values(), *(f"regret by {name}" for name in SCORES), "seconds"]
    return both[[c for c in columns if c in both]].sort_values(["experiment", "source", "target", "arm", "seed"])


def table(rows: pd.DataFrame) -> str:
    """Markdown: an arm a line; mean ± half of the 95 % interval over seeds, paired difference to its baseline."""
    arms = sorted(dict.fromkeys(rows["arm"]), key=lambda a: (FIRST.index(a) if a in FIRST else len(FIRST), a))
    selected = {arm: some.set_index("seed")["selected"].to_dict() for arm, some in rows.groupby("arm")}
    lines = [f"| arm | runs | selected | minus {arms[0]} | oracle | regret |", "|---|---|---|---|---|---|"]
    for arm in arms:
        some = rows[rows["arm"] == arm]
        base = BASES[arm] if BASES.get(arm) in selected else arms[0]
        versus = compare_paired(selected[arm], selected[base]) if arm != base else None
        less = f"{100 * versus.difference.mean:+.1f} ± {100 * versus.difference.half:.1f}" if versus else ""
        less += f" (minus {base})" if base != arms[0] else ""
        cells = [_percent(list(some[c])) for c in ("selected", "oracle", "regret")]
        lines.append("| " + " | ".join([arm, str(len(some)), cells[0], less, *cells[1:]]) + " |")
    for arm, labels in ((arms[0], "source"), ("target-supervised", "target")):
        for name in (n for n in BASELINES.values() if n in rows):
            found = rows.loc[rows["arm"] == arm, name].dropna().unique()  # the same split for every seed: one value
            lines += [f"| {name} + logistic regression, {labels} labels | | {100 * v:.1f} | | | |" for v in found]
    return "\n".join(lines)


def same_rows(runs: pd.DataFrame) -> None:
    """Refuse runs of one pair that were tested on different rows of the target."""
    for pair, some in runs.groupby(["experiment", "source", "target"]):
        splits = [read_json(RunFolder(path).splits) for path in some["path"]]
        if len({tuple(sorted(s[name]["test"])) for s in splits for name in str(pair[2]).split("+")}) > 1:
            raise SystemExit(f"{' '.join(map(str, pair))}: not all runs were tested on the same rows")


def selectors(rows: pd.DataFrame) -> str:
    """Markdown: mean regret of every score over the same runs, of methods on one unlabeled target."""
    adapted = rows[~rows["arm"].isin([*FIRST, *BASES.values()]) & ~rows["experiment"].isin(APART)]
    columns = [c for c in rows.columns if c.startswith("regret by ")]
    adapted = adapted.dropna(subset=columns)
    found = sorted((adapted[c].mean(), c.removeprefix("regret by ")) for c in columns)
    heads = [f"| chosen by | mean regret over {len(adapted)} runs |", "|---|---|"]
    return "\n".join([*heads, *(f"| {name} | {100 * mean:.1f} |" for mean, name in found)])


def _percent(values: list[float]) -> str:
    found = interval(values)
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.half:.1f}" if found.n > 1 else "")


def main() -> int:
    rows = pd.read_csv(HERE / "results.csv")
    if sys.argv[1:]:
        rows = merged(results(sys.argv[1:]), rows)
        rows.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    for (name, source, target), some in rows.groupby(["experiment", "source", "target"], sort=False):
        print(f"\n**{name}: {source} -> {target}**\n\n{table(some)}")
    print(f"\n{selectors(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
