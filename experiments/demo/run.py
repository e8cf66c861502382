"""The demo: a few ways to fine-tune from handwritten digits to digits blended into photographs, three seeds each.

    python experiments/demo/run.py [--seeds 3] [--images 600] [--out runs/demo] [--workers 2]      (or: make demo)

Everything comes from installed packages: the images (make_data.py) and the ImageNet EfficientNet-lite0. Each run is one
`crossft fit` with the flags below, so any of them can be repeated by hand: the command is the first line of its log.
Runs that are finished are kept and unfinished ones resumed; remove the folder to start again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
SOURCE, TARGET, SHOTS = "digits", "blended", 10

LR, SIZE = "--model.init_args.optimizer.init_args.lr=3e-4", "--model.init_args.backbone.init_args.image_size=40"
QUIET = ["--wandb.mode=disabled", "--trainer.enable_progress_bar=false", "--checkpoints.keep=1"]
COMMON = ["--experiment=demo", LR, SIZE, "--data.augment=light", "--data.batch_size=32", *QUIET]
FROZEN, TRAINING = "--model.init_args.batchnorm=frozen", "--model.init_args.batchnorm=training"
LABELED = ["--config=configs/vision/domains.yaml", f"--data.shots={SHOTS}", "--trainer.max_epochs=10"]
LABELED += ["--source_leg.trainer.max_epochs=5", "--source_leg.model.init_args.batchnorm=frozen"]
UNLABELED = ["--config=configs/vision/adapt.yaml", "--trainer.max_steps=65", FROZEN]  # as many as the source leg
FREEZE = ["--methods.freeze=crossft.callbacks.freezing.Freeze", "--methods.freeze.train_last=0"]
L2SP = ["--methods.l2sp=crossft.callbacks.retention.L2SP", "--methods.l2sp.weight=1"]

ARMS: dict[str, list[str]] = {
    "probe": [*LABELED, FROZEN, *FREEZE],
    "source-only": [*UNLABELED, "--methods.dann=null"],
    "dann": [*UNLABELED, "--methods.dann.weight=0.1"],  # how it was chosen: README.md
    "full": [*LABELED, FROZEN],
    "full-bn-training": [*LABELED, TRAINING],
    "l2sp": [*LABELED, FROZEN, *L2SP],
}
"""Flags of each arm. All labeled arms of a seed start from one source model, fitted once, BatchNorm frozen."""
BASELINE = "source-only"


def command(arm: str, seed: int, out: Path, data: Path) -> list[str]:
    """The arguments of one run's `crossft fit`."""
    place = [f"--arm={arm}", f"--seed_everything={seed}", f"--run.dir={out / f'{arm}-s{seed}'}"]
    domains = [f"--data.root={data}", f"--data.source={SOURCE}", f"--data.target={TARGET}"]
    return ["fit", *ARMS[arm], *COMMON, *domains, *place, f"--run.root={out.parent}"]


def run(arm: str, seed: int, out: Path, data: Path) -> str | None:
    """Run one arm and seed in this process, its output in a log; return None, or why it failed."""
    from crossft.cli import main
    from crossft.runs import RunFolder

    words = command(arm, seed, out, data)
    folder, log = RunFolder(out / f"{arm}-s{seed}"), out / "logs" / f"{arm}-s{seed}.log"
    line = f"crossft {shlex.join(words)}\n"
    if folder.summary_file.exists():
        if not log.is_file() or log.read_text().splitlines(keepends=True)[:1] != [line]:
            return f"{folder.path} was run with other settings; remove {out} to start again"
        if folder.summary()["status"] == "finished":
            return None
        words = ["resume", str(folder.path)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a" if words[0] == "resume" else "w", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        file.write(line if words[0] == "fit" else "")
        file.flush()
        code = main(words)
    return f"exit code {code}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-5:]) if code else None


def run_all(arms: Sequence[str], seeds: int, out: Path, data: Path, workers: int) -> bool:
    """Run every arm and seed, `workers` at a time, a line for each; return whether all finished."""
    from crossft.runs import RunFolder

    started, failed = time.monotonic(), 0
    jobs = [(arm, seed) for arm in arms for seed in range(seeds)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, arm, seed, out, data): (arm, seed) for arm, seed in jobs}
        for number, done in enumerate(as_completed(waiting), 1):
            arm, seed = waiting[done]
            problem = repr(done.exception()) if done.exception() else done.result()
            failed += problem is not None
            metrics = {} if problem else RunFolder(out / f"{arm}-s{seed}").summary()["metrics"]
            shown = "  ".join(f"{d} {metrics[f'{d}/test/accuracy']:.3f}" for d in ("source", "target") if metrics)
            took = f"{time.monotonic() - started:4.0f} s"
            print(f"[{number:2}/{len(jobs)}] {took}  {arm:18} seed {seed}  {problem or shown}", flush=True)
    return not failed


def report(out: Path) -> None:
    """Print the table; write it, the picture and the page; say where everything lies."""
    import pandas as pd
    from rich.console import Console

    from crossft.reports.figures import tradeoff
    from crossft.reports.page import write_page
    from crossft.reports.records import leaves, read_records, with_baseline
    from crossft.reports.tables import compare

    records = leaves(read_records([out]))
    records = pd.concat([starting_model(records), records], ignore_index=True)
    (table,) = compare(records, BASELINE)
    Console(width=120).print(table.rich())
    picture = tradeoff(with_baseline(records, BASELINE), out / "tradeoff.png", title=table.title)
    page = write_page([out], out / "index.html", baseline=BASELINE)
    columns = ["arm", "seed", "source", "target", "seconds", *table.metrics]
    with_baseline(records, BASELINE)[columns].to_csv(out / "results.csv", index=False, float_format="%.4f")
    for name, path in (("runs", out), ("results", out / "results.csv"), ("picture", picture), ("page", page)):
        print(f"{name:8} {path}")


def starting_model(records: pd.DataFrame) -> pd.DataFrame:
    """The source model itself as an arm `before`: what every labeled arm measured before it began."""
    rows = records[records["arm"] == "probe"].assign(arm="before", run="before", seconds=0.0)
    for column in [c for c in rows.columns if c.endswith("/before")]:
        rows[column.removesuffix("/before")] = rows[column]
    return rows.assign(**{"source/retention": 1.0, "source/gain": 0.0, "target/gain": 0.0})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=600, help="pictures a domain, at most 870")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    args = parser.parse_args()
    out = Path(os.path.relpath(args.out, ROOT))  # as it stands in the commands, which run from the repository
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    from make_data import contact_sheet, make_data

    started = time.monotonic()
    data = make_data(out / f"data-{args.images}", args.images)
    print(f"{args.images} images a domain in {data}; a look at them: {contact_sheet(data, out / 'domains.png')}")
    print(f"{len(ARMS)} arms x {args.seeds} seeds, {SOURCE} -> {TARGET}; the first runs fit the source")
    if not run_all(list(ARMS), args.seeds, out, data, args.workers):
        return 1
    report(out)
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
