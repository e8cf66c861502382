"""How long ``crossft compare`` takes over many run folders, and that it imports no torch.

    python benchmarks/compare_folders.py [--runs 500] [--rounds 3]

The folders are made here, as runs leave them: 10 arms x 10 seeds x 5 targets, with summary, config, curves, ledger and
calibration. Each command is a process of its own, from its start to its end, and its wall time is shown: the tables in
the terminal, and the tables with the page. The aim is under 3 seconds for the tables.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from crossft.runs import MetricsCsv, RunFolder, run_id, write_atomic

AIM = 3.0
TARGETS = ("sketch", "cartoon", "art_painting", "usps", "mnist")
CODE = "import sys; from crossft.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
LEDGER = "phase,step,stage,parameters,trainable,lr,weight_decay,mode,batchnorm\n"


def write_run(root: Path, arm: int, seed: int, target: str) -> None:
    experiment = root / "many" / target
    folder = RunFolder.create(
        experiment / run_id(f"arm{arm}", seed, "abcdef12"), experiment="many", arm=f"arm{arm}", seed=seed
    )
    noise = ((arm * 7 + seed * 13 + len(target) * 5) % 17) / 200
    metrics: dict[str, float | None] = {}
    for key, before, after in (("target", 0.3, 0.5 + arm / 50 + noise), ("source", 0.95, 0.9 - arm / 80 + noise / 4)):
        for name in (
            "accuracy",
            "balanced_accuracy",
            "macro_f1",
            "auroc",
            "average_precision",
            "calibration_error",
            "loss",
        ):
            metrics |= {f"{key}/test/{name}": after, f"{key}/test/{name}/before": before}
        metrics |= {f"{key}/gain": after - before, f"{key}/retention": after / before}
    domains, primary = {"source": ["photo"], "target": [target]}, {"source": "accuracy", "target": "accuracy"}
    folder.write_summary(status="finished", seconds=60.0, metrics=metrics, domains=domains, primary=primary)
    log = MetricsCsv(folder.metrics)
    for step in range(0, 400, 10):
        log.append(step, step // 40, {"train/loss": 2 / (1 + step), "lr-AdamW/head": 1e-3, "source/val/accuracy": 0.9})
    log.close()
    stages = [f"0,0,blocks.{i},1000,1000,0.001,0.01,train,frozen\n" for i in range(9)]
    write_atomic(folder.ledger, LEDGER + "".join(stages))
    bins = "".join(f"{i / 15},{(i + 1) / 15},10,{(i + 0.5) / 15},{(i + 0.4) / 15}\n" for i in range(15))
    write_atomic(folder.path / "calibration" / f"{target}.csv", f"low,high,rows,confidence,accuracy\n{bins}")
    init = {"backbone": {"class_path": "crossft.backbones.Timm", "init_args": {"name": "x", "image_size": 96}}}
    config = {"model": {"class_path": "crossft.tasks.Classification", "init_args": init}, "data": {"shots": arm}}
    write_atomic(folder.config, yaml.safe_dump(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number in range(options.runs):
            write_run(root, number // 5 % 10, number // 50, TARGETS[number % 5])
        common = [sys.executable, "-c", CODE, "compare", str(root / "many"), "--baseline", "arm0"]
        medians = []
        for what, more in (("tables", []), ("tables and page", ["--output", str(root / "page.html")])):
            took = []
            for _ in range(options.rounds):
                began = time.perf_counter()
                done = subprocess.run([*common, *more], capture_output=True, text=True, check=False)
                took.append(time.perf_counter() - began)
                assert done.returncode == 0, f"torch was imported, or: {done.stderr[-2000:]}"
            medians.append(statistics.median(took))
            rounds = ", ".join(f"{seconds:.2f}" for seconds in took)
            print(f"{options.runs} run folders, {what}: {medians[-1]:.2f} s (rounds: {rounds})")
        print(f"no torch was imported; the page has {(root / 'page.html').stat().st_size / 1e6:.2f} MB")
    print(f"aim for the tables: < {AIM:.0f} s: {'reached' if medians[0] < AIM else 'MISSED'}")
    return 0 if medians[0] < AIM else 1


if __name__ == "__main__":
    sys.exit(main())
