"""What sharing a source model saves: a sweep of six methods against six independent runs, side by side.

    python benchmarks/shared_prefix.py [--slots 2] [--source-epochs 3] [--limit ROWS]

On pacs-96 (sketch -> photo, 10 shots, 64 px, EfficientNet-lite0 from packages) each of six methods fine-tunes the
source model of one seed; the source leg is as long as configs/vision/domains.yaml has it. The sweep fits that model
once; the independent runs, ``crossft fit`` with a folder of its own each, fit it each for itself. Both have the same
number of processes at a time, one thread each, and their wall time is compared, the sweep's plan and report included;
the metrics of both ways must be equal. The aim is twice as fast. Data is read from CROSSFT_DATA (default
../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from crossft.runs import RunFolder
from crossft.sweeps.arms import arguments

HERE = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CROSSFT_DATA", HERE.parent / "shared" / "data")) / "pacs-96"
CONFIG = HERE / "configs" / "vision" / "domains.yaml"
AIM = 2.0
RETENTION, FREEZE = "crossft.callbacks.retention", "crossft.callbacks.freezing.Freeze"
ARMS: dict[str, dict[str, object]] = {
    "probe": {"methods.freeze": FREEZE, "methods.freeze.train_last": 0},
    "last-two": {"methods.freeze": FREEZE, "methods.freeze.train_last": 2},
    "l2sp": {"methods.l2sp": f"{RETENTION}.L2SP"},
    "mixout": {"methods.mixout": f"{RETENTION}.Mixout"},
    "lwf": {"methods.lwf": f"{RETENTION}.LwF"},
    "bss": {"methods.bss": f"{RETENTION}.BSS"},
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def crossft(*words: str) -> float:
    """Run one command; return its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "crossft.cli", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"crossft {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def metrics(root: Path) -> dict[str, dict[str, float]]:
    """The final metrics of the runs below ``root`` by arm, without the source legs."""
    summaries = [RunFolder(file.parent).summary() for file in root.rglob("summary.json")]
    return {s["arm"]: s["metrics"] for s in summaries if s["arm"] != "source"}


def sources(root: Path) -> str:
    """Number of source legs, and the seconds each."""
    seconds = [RunFolder(path).summary()["seconds"] for path in root.rglob("source-*") if path.is_dir()]
    return f"{len(seconds)}, of {', '.join(f'{s:.0f}' for s in seconds)} s"


def shared(root: Path, flags: list[str], slots: int) -> float:
    file = root / "shared.yaml"
    file.write_text(yaml.safe_dump({"config": str(CONFIG), "arms": ARMS}, sort_keys=False))
    run_root = f"--run.root={root / 'shared'}"
    return crossft("sweep", "run", str(file), f"--slots={slots}", "--threads=1", run_root, *flags)


def independent(root: Path, flags: list[str], slots: int) -> float:
    def one(arm: str) -> float:
        own = [f"--run.root={root / 'alone' / arm}", f"--arm={arm}", *arguments(ARMS[arm])]
        return crossft("fit", f"--config={CONFIG}", "--experiment=alone", *flags, *own)

    began = time.perf_counter()
    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(one, ARMS))
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=2, help="runs at a time")
    parser.add_argument("--source-epochs", type=int, default=3, help="as configs/vision/domains.yaml has it")
    parser.add_argument("--limit", type=int, help="at most so many rows of each domain, to try the program")
    options = parser.parse_args()
    flags = [
        f"--data.root={DATA}", "--data.source=sketch", "--data.target=photo", "--data.splits=[0.8,0.1,0.1]",
        f"--data.limit={options.limit or 'null'}", f"--data.shots={2 if options.limit else 10}",
        "--model.backbone.image_size=64", f"--source_leg.trainer.max_epochs={options.source_epochs}",
        "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--wandb.mode=disabled",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        once = shared(root, flags, options.slots)
        print(f"sweep, source fitted once     {once:6.1f} s (source legs: {sources(root / 'shared')})", flush=True)
        each = independent(root, flags, options.slots)
        print(f"independent runs, one each    {each:6.1f} s (source legs: {sources(root / 'alone')})")
        equal = metrics(root / "shared") == metrics(root / "alone")
        print(f"metrics of both ways equal    {equal} ({len(metrics(root / 'alone'))} arms)")
    print(json.dumps({"slots": options.slots, "shared": round(once, 1), "independent": round(each, 1)}))
    print(f"{each / once:.2f} times as fast; the aim is {AIM:.0f}: {'reached' if each / once >= AIM else 'MISSED'}")
    return 0 if each / once >= AIM and equal else 1


if __name__ == "__main__":
    sys.exit(main())
