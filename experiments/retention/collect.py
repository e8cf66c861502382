"""Collect the sweeps: results.csv (one row a run, and a blend of one) and the tables of the README.

python experiments/retention/collect.py runs/retention-pacs runs/retention-pacs-few ...

Rows of results.csv whose runs are not among these folders stay; without a folder only the tables are printed. Of a
method the tables give the hypervolume (the area under gain against retention over its strengths, per seed) and, of its
strengths, the one of largest mean gain among those that keep at least 90 % of the source.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from crossft.reports.records import leaves, read_records
from crossft.reports.stats import Interval, compare_paired, interval
from crossft.reports.strengths import hypervolume, with_blends

HERE = Path(__file__).resolve().parent
KEY = ["experiment", "arm", "seed", "source", "target"]
NAMES = {
    "target/test/accuracy": "target accuracy",
    "source/test/accuracy": "source accuracy",
    "target/gain": "gain",
    "source/retention": "retention",
    "source/batchnorm/statistics": "lost by statistics",
    "source/batchnorm/weights": "lost by weights",
}
SEQUENCE = ["acc", "bwt", "forgetting", "fwt", "learning_accuracy"]
KEPT = 0.9
MNIST = "mnist-split"
PUBLISHED = {"plain": "59.2", "ewc": "64.0", "si": "65.4", "lwf": "71.5"}
"""van de Ven & Tolias 2019, table 4, domain-incremental learning: mean over 20 seeds."""


def results(paths: list[str]) -> pd.DataFrame:
    """One row a finished run, source legs left out."""
    runs = leaves(with_blends(read_records(paths))).sort_values("written", kind="stable")
    for _, run in runs[runs["status"] != "finished"].iterrows():
        print(f"left out: {run['run']} is {run['status']}", file=sys.stderr)
    runs = runs[(runs["status"] == "finished") & (runs["arm"] != "source")].copy()
    runs["experiment"] = runs["experiment"].str.removeprefix("retention-")
    shown = {**NAMES, **{f"sequence/{n}": n for n in SEQUENCE}}
    columns = {c: name for c, name in shown.items() if c in runs.columns}
    return runs.rename(columns=columns)[[*KEY, *columns.values(), "seconds"]]


def merged(new: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``before`` that have no newer run, and ``new``."""
    both = pd.concat([before, new], ignore_index=True).drop_duplicates(KEY, keep="last")
    both["seed"] = both["seed"].astype(int)
    columns = [*KEY, *NAMES.values(), *SEQUENCE, "seconds"]
    return both[[c for c in columns if c in both]].sort_values(["experiment", "source", "target", "arm", "seed"])


def volumes_of(rows: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Hypervolume by method and seed."""
    found: dict[str, dict[int, float]] = {}
    for (method, seed), some in rows.groupby([rows["arm"].str.split(",").str[0], "seed"]):
        found.setdefault(str(method), {})[int(seed)] = hypervolume(list(zip(some["retention"], some["gain"])))
    return found


def methods(rows: pd.DataFrame) -> str:
    """Markdown: a method a line, by falling hypervolume; paired difference of it to plain fine-tuning."""
    volumes = volumes_of(rows)
    lines = [
        "| method | strengths | hypervolume | minus plain | best: strength | gain | retention |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in sorted(volumes, key=lambda m: -interval(list(volumes[m].values())).mean):
        own = rows[rows["arm"].str.split(",").str[0] == method]
        versus = compare_paired(volumes[method], volumes["plain"]) if method != "plain" else None
        cells = [method, str(own["arm"].nunique()), _percent(list(volumes[method].values()))]
        cells.append(_signed(versus.difference) if versus else "")
        means = own.groupby("arm")[["retention", "gain"]].mean()
        able = means[means["retention"] >= KEPT]
        if len(able):
            best = str(able["gain"].idxmax())
            one = own[own["arm"] == best]
            cells += [best.partition(",")[2].rpartition("=")[2], _percent(list(one["gain"]))]
            cells.append(_percent(list(one["retention"])))
        else:
            cells += ["none keeps 90 %", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(rows: pd.DataFrame) -> str:
    """Markdown, for the README of the project: a method a line, hypervolumes and the sequence's accuracy."""
    regimes = {"pacs": "all labels", "pacs-few": "ten labels a class", "amazon": "airline"}
    found: dict[str, dict[str, str]] = {}
    for name, title in regimes.items():
        for method, each in volumes_of(rows[rows["experiment"] == name]).items():
            found.setdefault(method, {})[title] = _percent(list(each.values()))
    for arm, some in rows[rows["experiment"] == "pacs-sequence"].groupby("arm"):
        found.setdefault(str(arm), {})["sequence"] = _percent(list(some["acc"]))
    columns = [*regimes.values(), "sequence"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    order = sorted(found, key=lambda m: -float(found[m].get("all labels", "0").split()[0]))
    lines += ["| " + " | ".join([m, *(found[m].get(c, "") for c in columns)]) + " |" for m in order]
    return "\n".join(lines)


def arms(rows: pd.DataFrame) -> str:
    """Markdown: an arm a line with its test accuracies."""
    lines = ["| arm | target | gain | source | retention |", "|---|---|---|---|---|"]
    columns = ["target accuracy", "gain", "source accuracy", "retention"]
    for arm, own in rows[~rows["arm"].str.contains("wiseft")].groupby("arm"):
        lines.append("| " + " | ".join([str(arm), *(_percent(list(own[c])) for c in columns)]) + " |")
    return "\n".join(lines)


def sequences(rows: pd.DataFrame) -> str:
    """Markdown: an arm a line, by falling accuracy over all domains."""
    lines = [
        "| arm | ACC | minus plain | BWT | forgetting | FWT | learning accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    accs = {arm: own.set_index("seed")["acc"].to_dict() for arm, own in rows.groupby("arm")}
    for arm in sorted(accs, key=lambda a: -interval(list(accs[a].values())).mean):
        own = rows[rows["arm"] == arm]
        cells = {c: _percent(list(own[c])) for c in SEQUENCE if own[c].notna().all()}
        less = _signed(compare_paired(accs[arm], accs["plain"]).difference) if arm != "plain" else ""
        row = [str(arm), cells["acc"], less, *(cells.get(c, "") for c in SEQUENCE[1:])]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def peers(rows: pd.DataFrame) -> str:
    """Markdown: accuracy over the five tasks of split MNIST, beside Avalanche's and the published figures."""
    other = pd.read_csv(HERE / "avalanche.csv") if (HERE / "avalanche.csv").is_file() else None
    lines = ["| method | crossft | Avalanche | published |", "|---|---|---|---|"]
    for arm in ("plain", "ewc", "ewc x 128", "si", "lwf", "replay"):
        own = rows.loc[rows["arm"] == arm, "acc"]
        theirs = [] if other is None else list(other.loc[other["method"] == arm, "acc"])
        if not len(own) and not theirs:
            continue
        cells = [_percent(list(v)) if len(v) else "" for v in (own, theirs)]
        lines.append("| " + " | ".join([arm, *cells, PUBLISHED.get(arm, "")]) + " |")
    return "\n".join(lines)


def _percent(values: list[float]) -> str:
    found = interval(values)
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.half:.1f}" if found.n > 1 else "")


def _signed(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}"


def main() -> int:
    file = HERE / "results.csv"
    rows = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=KEY)
    if sys.argv[1:]:
        rows = merged(results(sys.argv[1:]), rows)
        rows.to_csv(file, index=False, float_format="%.4f")
    for name, some in rows.groupby("experiment", sort=False):
        print(f"\n**{name}**\n")
        if "acc" in some and some["acc"].notna().any():
            print(peers(some) if name == MNIST else sequences(some))
        else:
            print(f"{methods(some)}\n\n{arms(some)}")
    print(f"\n**overview**\n\n{overview(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
