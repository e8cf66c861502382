"""What the frozen-prefix cache saves: epochs of a hand-written PyTorch loop against ours, side by side.

    python benchmarks/prefix_cache.py [--rows 512] [--texts 320] [--rounds 3] [--wall]

Two backbones from packages, EfficientNet-lite0 on pacs-96 (photo) and MiniLM on amazon4-airline (books), each as a
linear probe and with its last two stages training, on the same batches in the same order. Three things take turns:

- `loop`: a hand-written loop without a cache: it decodes, runs the whole network, and trains what is not frozen;
- `crossft`: the same training under Lightning with `PrefixCache`, its values already stored;
- `bound`: the hand-written loop above the cut alone, its inputs ready in memory: what a cache without any cost gives.

Then five epochs of a linear probe from an empty cache, building included, against five epochs of the loop. Only
training epochs are timed, and medians over the rounds are shown. Everything runs in one thread, and seconds are those
of the processor, since other programs may run beside it (--wall takes the clock on the wall). The aims are >= 50 times
for the probe, within 10 % of the bound for the last two stages, and >= 4 times for five epochs. Data is read from
CROSSFT_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from typing import Any

from cases import Build, make, quiet, text, vision
from timing import clock

# isort: split
import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import Freeze
from crossft.data import DomainData

PROBE, SHARE, FIVE = 50.0, 0.9, 4.0


def loop(build: Build, data: DomainData, last: int, ready: bool, epochs: int = 1) -> float:
    """Seconds of these epochs of the hand-written loop; ``ready`` starts above the cut, inputs in memory."""
    task = make(build, data, last)
    backbone, head = task.backbone, nn.Linear(task.backbone.num_features, len(data.domains[0].labels))
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()], lr=3e-4, fused=True)
    names = [s.name for s in backbone.stages]
    cut = names[len(names) - last] if last else None
    below = (names[names.index(cut) - 1],) if cut else ()
    batches: Any = data.train_dataloader()
    if ready:
        with torch.no_grad():
            coded = [(backbone(b.inputs, capture=below), b) for b in batches]
        batches = [(e.stages[below[0]] if cut else e.features, b) for e, b in coded]
    start = clock()
    for item in (item for _ in range(epochs) for item in batches):
        value, batch = item if ready else (None, item)
        if cut is None:
            with torch.no_grad():
                features = value if ready else backbone(batch.inputs).features
        elif ready:
            features = backbone.forward_from(cut, value, batch.inputs).features
        else:
            features = backbone(batch.inputs).features
        loss = F.cross_entropy(head(features), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock() - start


class Clock(pl.Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = clock()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(clock() - self.start)


def ours(build: Build, data: DomainData, last: int, epochs: int) -> list[float]:
    """Seconds of each epoch with the cache."""
    task, clock = make(build, data, last), Clock()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Freeze(train_last=last), PrefixCache(), clock],
    )
    trainer.fit(task, data)
    return clock.seconds


def compare(name: str, build: Build, data: DomainData, rounds: int) -> bool:
    """Print one backbone's rows; return whether the aims are met."""
    held = True
    for last, mode in ((0, "linear probe"), (2, "last 2 stages")):
        first = ours(build, data, last, 1)[0]
        times: dict[str, list[float]] = {"loop": [], "crossft": [], "bound": []}
        again = []
        for _ in range(rounds):
            times["loop"].append(loop(build, data, last, ready=False))
            epochs = ours(build, data, last, 4)
            again.append(epochs[0])
            times["crossft"].append(statistics.median(epochs[1:]))
            times["bound"].append(loop(build, data, last, ready=True))
        base, cached, bound = (statistics.median(times[k]) for k in ("loop", "crossft", "bound"))
        print(
            f"{name:19}{mode:14}{base:9.3f}{first:10.3f}{statistics.median(again):10.3f}{cached:10.3f}{bound:10.3f}"
            f"{base / cached:9.1f}x{base / bound:9.1f}x"
        )
        held &= base / cached >= PROBE if last == 0 else bound / cached >= SHARE
    return held


def five(name: str, build: Build, data: DomainData, rounds: int) -> bool:
    """Print five epochs of a probe from an empty cache against five of the loop."""
    mine, theirs, former = [], [], os.environ["CROSSFT_CACHE"]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CROSSFT_CACHE"] = folder
            mine.append(sum(ours(build, data, 0, 5)))
        theirs.append(loop(build, data, 0, ready=False, epochs=5))
    os.environ["CROSSFT_CACHE"] = former
    ours_, loop_ = statistics.median(mine), statistics.median(theirs)
    print(
        f"{name:19}five epochs of a linear probe, building included: {loop_:.2f} s, {ours_:.2f} s: {loop_ / ours_:.1f}x"
    )
    return loop_ / ours_ >= FIVE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="images")
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true", help="seconds of the wall clock")
    args = parser.parse_args()
    if args.wall:
        os.environ["BENCH_WALL"] = "1"
    quiet()
    cases = {"EfficientNet-lite0": vision(args.rows), "MiniLM": text(args.texts)}
    columns = ("building", "next run", "cached", "bound", "faster", "bound")
    print(f"{'seconds of an epoch':33}{'loop':>9}" + "".join(f"{c:>10}" for c in columns))
    held = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CROSSFT_CACHE"] = folder
        for name, (build, data) in cases.items():
            held &= compare(name, build, data, args.rounds)
        for name, (build, data) in cases.items():
            held &= five(name, build, data, args.rounds)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
