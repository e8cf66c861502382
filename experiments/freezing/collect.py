"""Collect the sweeps: results.csv (one row a run), the tables of the README, and tradeoff.png.

python experiments/freezing/collect.py runs/freezing-pacs-shots runs/freezing-pacs-most runs/freezing-amazon
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from crossft.callbacks.monitoring import load_checkpoint
from crossft.reports.records import leaves, read_records
from crossft.reports.stats import compare_paired, interval
from crossft.runs import RunFolder, replacing

HERE = Path(__file__).resolve().parent
ARMS = ("full", "probe", "lp-ft", "last-2", "gradual-epoch", "gradual-plateau", "layer-decay", "bitfit", "lora")
AFTER, BEFORE, KEPT = "target/test/accuracy", "target/test/accuracy/before", "source/test/accuracy"
SHARE, EPOCH = "trainable share", "seconds an epoch"


def trainable_share(folder: RunFolder, steps: int) -> float:
    """Share of the parameters that train, averaged over the optimizer steps."""
    with folder.ledger.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    starts = sorted({int(row["step"]) for row in rows})
    total = 0.0
    for start, end in zip(starts, [*starts[1:], steps]):
        phase = [row for row in rows if int(row["step"]) == start]
        total += (end - start) * sum(int(r["trainable"]) for r in phase) / sum(int(r["parameters"]) for r in phase)
    return total / steps


def measured(path: str) -> tuple[float, float]:
    """Trainable share of a finished run, and seconds of training an epoch without its validation."""
    folder = RunFolder(path)
    checkpoint = load_checkpoint(folder.last)
    times = checkpoint["callbacks"]["Timer"]["time_elapsed"]
    seconds = (times["train"] - times["validate"]) / (checkpoint["epoch"] + 1)
    return trainable_share(folder, checkpoint["global_step"]), seconds


def results(paths: list[str]) -> pd.DataFrame:
    """One row a finished run of the sweeps, source legs left out."""
    runs = leaves(read_records(paths))
    unfinished = runs[runs["status"] != "finished"]
    for _, run in unfinished.iterrows():
        print(f"left out: {run['run']} is {run['status']}", file=sys.stderr)
    runs = runs[runs["status"] == "finished"].copy()
    runs[[SHARE, EPOCH]] = [measured(path) for path in runs["path"]]
    runs["order"] = [ARMS.index(arm) for arm in runs["arm"]]
    runs["experiment"] = runs["experiment"].str.removeprefix("freezing-")
    columns = ["experiment", "arm", "seed", "source", "target", AFTER, BEFORE, "target/gain", KEPT, "source/retention"]
    return runs.sort_values(["experiment", "order", "seed"])[[*columns, SHARE, EPOCH, "seconds"]]


def table(rows: pd.DataFrame) -> str:
    """Markdown: mean and half of the 95 % interval over the seeds, and the paired difference to ``full``."""
    lines = ["| arm | runs | target | minus full | source kept | trains | s/epoch |", "|---|---|---|---|---|---|---|"]
    before = interval(list(rows.drop_duplicates("seed")[BEFORE]))
    lines.append(f"| before | {before.n} | {_percent(before.mean, before.half)} | | 100 | | |")
    full = rows[rows["arm"] == "full"].set_index("seed")[AFTER].to_dict()
    for arm, some in rows.groupby("arm", sort=False):
        after, kept = interval(list(some[AFTER])), interval(list(some["source/retention"]))
        versus = compare_paired(some.set_index("seed")[AFTER].to_dict(), full) if arm != "full" else None
        less = f"{100 * versus.difference.mean:+.1f} ± {100 * versus.difference.half:.1f}" if versus else ""
        cells = [arm, after.n, _percent(after.mean, after.half), less, _percent(kept.mean, kept.half)]
        cells += [f"{some[SHARE].mean():.1%}", f"{some[EPOCH].mean():.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _percent(mean: float, half: float) -> str:
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Target accuracy against source retention, a panel a sweep: seeds as dots, means as large ones."""
    names = list(dict.fromkeys(rows["experiment"]))
    figure = Figure(figsize=(4.6 * len(names), 4.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for index, arm in enumerate(ARMS):
            some = rows[(rows["experiment"] == name) & (rows["arm"] == arm)]
            x, y = 100 * some["source/retention"], 100 * some[AFTER]
            marker = "os^Dv*Pph"[index]
            axis.scatter(x, y, color=f"C{index}", s=12, alpha=0.45, marker=marker)
            axis.scatter(x.mean(), y.mean(), color=f"C{index}", s=80, marker=marker, label=arm)
        axis.set_title(name)
        axis.set_xlabel("source kept (% of the accuracy before)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("target accuracy (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": ""})


def main() -> int:
    rows = results(sys.argv[1:])
    rows.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    for name, some in rows.groupby("experiment", sort=False):
        print(f"\n{name}\n\n{table(some)}")
    draw(rows, HERE / "tradeoff.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
