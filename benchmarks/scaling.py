"""What crossft's own work costs: each method's term, two processes, and the number of samples, stages and domains.

    python benchmarks/scaling.py [--rounds 3] [--steps 6] [--wall]

1. Methods: a full step of EfficientNet-lite0 on photo and sketch of pacs-96 (16 images), with each method over the
   step without any, by the median of ratios within a round.
2. Processes: seconds of an epoch of the same rows with one process and with two (gloo, one thread each, half of the
   batch each), on the wall: 0.5 is the best there is.
3. Bookkeeping: microseconds of a step on a linear net, over the number of stages and of domains; and of texts read,
   checked, split and drawn, over the number of samples. Flat is the best there is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from cases import ROOT, quiet
from peers import WARM_UP, Steps, Watch, trainer
from step_overhead import CLASSES, LinearBackbone, fit, make_batches
from timing import clock, median_ratio, take_turns

# isort: split
import torch
from torch import nn

from crossft.backbones import Timm
from crossft.backbones.base import StagePlan
from crossft.callbacks.adaptation import (
    AFN,
    BNM,
    BSP,
    CDAN,
    CMD,
    CORAL,
    DANN,
    JAN,
    MCC,
    MCD,
    MDD,
    MMD,
    DomainMixup,
    EntropyMinimization,
    MeanTeacher,
    PseudoLabels,
)
from crossft.callbacks.averaging import EMA, SWA
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.retention import (
    AGEM,
    BSS,
    DELTA,
    EWC,
    L2SP,
    MAS,
    R3F,
    SI,
    SMART,
    DERPlusPlus,
    DriftLimit,
    FeatureDistillation,
    LwF,
    Mixout,
    Replay,
)
from crossft.data import DomainData
from crossft.tasks import Classification
from crossft.types import Domain, Encoded

METHODS: dict[str, Any] = {
    "no method": lambda: [],
    "DANN": lambda: [DANN()],
    "CDAN": lambda: [CDAN()],
    "CORAL": lambda: [CORAL()],
    "MMD": lambda: [MMD()],
    "MCC": lambda: [MCC()],
    "entropy": lambda: [EntropyMinimization()],
    "MDD": lambda: [MDD()],
    "mean teacher": lambda: [MeanTeacher()],
    "JAN": lambda: [JAN()],
    "CMD": lambda: [CMD()],
    "MCD": lambda: [MCD()],
    "AFN": lambda: [AFN()],
    "BNM": lambda: [BNM()],
    "BSP": lambda: [BSP()],
    "pseudo-labels": lambda: [PseudoLabels()],
    "domain mixup": lambda: [DomainMixup()],
    "L2-SP": lambda: [L2SP()],
    "EWC": lambda: [EWC(samples=16)],
    "MAS": lambda: [MAS(samples=16)],
    "SI": lambda: [SI()],
    "drift limit": lambda: [DriftLimit(radius=0.1, relative=True)],
    "Mixout": lambda: [Mixout()],
    "BSS": lambda: [BSS()],
    "R3F": lambda: [R3F()],
    "SMART": lambda: [SMART()],
    "DELTA": lambda: [DELTA(attention="uniform")],
    "replay": lambda: [Replay(size=16, share=0.25)],
    "DER++": lambda: [DERPlusPlus(size=16, share=0.25)],
    "A-GEM": lambda: [AGEM(size=16)],
    "EMA": lambda: [EMA()],
    "SWA": lambda: [SWA()],
    "LwF": lambda: [LwF()],
    "feature distillation": lambda: [FeatureDistillation()],
}


def domains(rows: int, batch: int) -> DomainData:
    data = DomainData(
        ROOT / "pacs-96", source="photo", target="sketch", train_on=["source", "target"], target_labels="none",
        batch_size=batch, augment="none", image_size=96, limit=rows, splits=(1.0, 0.0, 0.0),
    )  # fmt: skip
    data.prepare()
    return data


def task_of(data: DomainData) -> Classification:
    backbone = Timm("packaged:efficientnet_lite0", image_size=96)
    data.bind(backbone.input_spec)
    return Classification(backbone, list(data.domains))


def methods(rounds: int, steps: int) -> None:
    def step(name: str) -> float:
        data, watch = domains(16 * (steps + WARM_UP), 16), Watch()
        settings = {"limit_train_batches": steps + WARM_UP, "use_distributed_sampler": False}
        trainer([*METHODS[name](), Steps(watch)], **settings).fit(task_of(data), data)
        return watch.seconds[0]

    found = take_turns({name: partial(step, name) for name in METHODS}, rounds)
    print(f"{'method':24}{'ms a step':>12}{'over none':>12}")
    for name, seconds in found.items():
        ratio = median_ratio(seconds, found["no method"])
        print(f"{name:24}{statistics.median(seconds) * 1e3:12.1f}{ratio:12.3f}", flush=True)


def child(steps: int) -> None:
    """An epoch in one of one or two processes."""
    quiet()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data, watch = domains(16 * (steps + WARM_UP), 16 // world), Watch()
    parallel = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    settings = {"limit_train_batches": steps + WARM_UP, "use_distributed_sampler": False, **parallel}
    os.environ["BENCH_WALL"] = "1"
    trainer([Steps(watch)], **settings).fit(task_of(data), data)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(watch.seconds[1]))


def processes(rounds: int, steps: int) -> None:
    def epoch(world: int) -> float:
        more = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if world > 1 else []
        command = [sys.executable, *more, str(Path(__file__).resolve()), "--child", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1]))

    found = take_turns({"1 process": partial(epoch, 1), "2 processes": partial(epoch, 2)}, rounds)
    print(f"\n{'16 images a step':24}{'ms a step':>12}{'over one':>12}")
    for name, seconds in found.items():
        ratio = median_ratio(seconds, found["1 process"])
        print(f"{name:24}{statistics.median(seconds) * 1e3:12.1f}{ratio:12.2f}", flush=True)


class Chain(LinearBackbone):
    """A linear net in many stages, all but the first of them the identity with one weight."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.rest = nn.ModuleList([nn.LayerNorm(1) for _ in range(stages - 1)])
        more = tuple(StagePlan(f"rest.{i}", (f"rest.{i}",)) for i in range(stages - 1))
        self._plans = (*self._plans, *more)

    def _encode(self, start: int, value: Any, inputs: Any, capture: Any) -> Encoded:
        return Encoded(features=self.linear(inputs["pixel_values"]))


def bookkeeping(rounds: int) -> None:
    def step(stages: int, count: int) -> float:
        _, batches = make_batches(300)
        for batch in batches:
            batch.domains = batch.domains % count
            batch.quota = (len(batch) / count,) * count
        labels = tuple("abcdefgh"[:CLASSES])
        named = [Domain(f"d{i}", "source" if i == 0 else "target", labels=labels) for i in range(count)]
        task = Classification(Chain(stages), named)
        freeze = [Freeze(train_last=stages - 1)] if stages > 1 else []
        return fit(task, batches, freeze, logger=False, enable_checkpointing=False)

    print(f"\n{'stages':>8}{'domains':>8}{'us a step':>12}{'over the first':>16}")
    grid = [(1, 1), (8, 1), (64, 1), (1, 4), (1, 16)]
    found = take_turns({f"{s:8}{d:8}": partial(step, s, d) for s, d in grid}, rounds)
    base = next(iter(found.values()))
    for name, seconds in found.items():
        print(f"{name}{statistics.median(seconds) * 1e6:12.0f}{median_ratio(seconds, base):16.2f}", flush=True)


def samples(rounds: int) -> None:
    """Texts of a table: seconds to read, check and split them the second time, and microseconds a row drawn."""
    from crossft.backbones import Transformer

    spec = Transformer("packaged:minilm").input_spec

    def read(root: Path) -> tuple[float, float]:
        data = DomainData(root, target="rows", batch_size=16, length_window=0)
        start = clock()
        data.prepare()
        prepared = clock() - start
        data.bind(spec)
        data.dataset  # noqa: B018
        start = clock()
        drawn = sum(len(batch) for _, batch in zip(range(60), data.train_dataloader()))
        return prepared, (clock() - start) / drawn

    print(f"\n{'samples':>8}{'us a sample to prepare':>24}{'us a row drawn':>18}")
    with tempfile.TemporaryDirectory() as folder:
        for count in (1_000, 10_000, 50_000):
            root = Path(folder) / str(count)
            root.mkdir()
            lines = [json.dumps({"text": f"the row {i} of a table", "label": "ab"[i % 2]}) for i in range(count)]
            (root / "rows.jsonl").write_text("\n".join(lines))
            read(root)
            found = [read(root) for _ in range(rounds)]
            prepared, row = (statistics.median(v) for v in zip(*found, strict=True))
            print(f"{count:8}{prepared / count * 1e6:24.1f}{row * 1e6:18.1f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--wall", action="store_true", help="seconds on the wall")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    if args.wall:
        os.environ["BENCH_WALL"] = "1"
    quiet()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CROSSFT_CACHE"] = folder
        methods(args.rounds, args.steps)
        processes(args.rounds, args.steps)
        bookkeeping(args.rounds)
        samples(args.rounds)
    print(f"\n{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
