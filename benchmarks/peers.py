"""Fine-tuning beside the peers: a hand-written loop, bare Lightning, HF Trainer, finetuning-scheduler, fastai, crossft.

    python benchmarks/peers.py [--steps 8] [--batch 8] [--rounds 3] [--starts 3] [--wall]

Each trains EfficientNet-lite0 on pacs-96 and MiniLM on amazon4-airline, in full, with the last two stages, and as a
linear probe: the same backbone, head, batches and AdamW, from the same loader; crossft with all that a run of it keeps.
They take turns in one process with one thread. `step` is the time from a batch's arrival to its end, `epoch` the time
with loading, each as the median ratio to the loop's. `crossft + cache` reads what enters the first trainable stage from
a warm cache.

Then each starts in a process of its own: seconds to the end of the first step, and the largest memory after five full
steps of 32 images (16 texts). The bound is 1.05 times the loop's memory for crossft. A peer that is not installed is
left out, and a line says so (pip install -r benchmarks/requirements.txt).
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
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

from cases import BACKBONES, Build, in_a_run, make, quiet, text, vision
from timing import MISSING, clock, median_ratio, peak, take_turns

# isort: split
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES: dict[str, int | None] = {"full": None, "last 2": 2, "probe": 0}
WARM_UP, MAX_MEMORY = 2, 1.05
LEFT_OUT: dict[str, str] = {"HF Trainer": "accelerate", "finetuning-scheduler": "finetuning_scheduler"} | {
    "fastai": "fastai"
}


class Watch:
    """Seconds of steps and of the whole, from the end of the warm-up on."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[float] = []
        self.done, self.first, self.last, self.on_step = 0, 0.0, 0.0, on_step

    def begin(self) -> None:
        self.start = clock()

    def end(self) -> None:
        self.last = clock()
        self.done += 1
        self.on_step(self.done)
        if self.done == WARM_UP:
            self.first = self.last
        elif self.done > WARM_UP:
            self.steps.append(self.last - self.start)

    @property
    def seconds(self) -> tuple[float, float]:
        """Median of a step, and mean with loading."""
        return statistics.median(self.steps), (self.last - self.first) / len(self.steps)


class Net(nn.Module):
    """The task's backbone and head, as every peer sees them."""

    def __init__(self, build: Build, data: Any, last: int | None) -> None:
        super().__init__()
        task = make(build, data, last)
        self.backbone, self.head = task.backbone, next(iter(task.heads.values()))
        self.frozen = [m for s in task.backbone.stages if s.name in task.frozen_stages for m in s.modules]
        self.train()

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        for module in self.frozen if hasattr(self, "frozen") else ():
            module.eval()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # as crossft does with a pretrained backbone
                module.eval()
        return self

    def forward(self, inputs: Any) -> Tensor:
        return self.head(self.backbone(inputs).features)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5, fused=True)


class Pairs:
    """(inputs, targets) of the data's own loader."""

    def __init__(self, data: Any, steps: int) -> None:
        self.data, self.steps = data, steps
        self.batch_size = data.batch_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for _, batch in zip(range(self.steps), self.data.train_dataloader()):
            yield dict(batch.inputs), batch.targets


def loop(net: Net, pairs: Pairs, watch: Watch) -> None:
    optimizer = net.optimizer()
    for inputs, targets in pairs:
        watch.begin()
        loss = F.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.end()


class Module(pl.LightningModule):
    """The least a LightningModule can be."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.net.optimizer()


class Steps(pl.Callback):
    """A watch on Lightning's batches."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, *_: Any) -> None:
        self.watch.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.end()


def trainer(callbacks: list[Any], **more: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **more}, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, callbacks=callbacks,
    )  # fmt: skip


def lightning(net: Net, pairs: Pairs, watch: Watch) -> None:
    trainer([Steps(watch)]).fit(Module(net), pairs)


def scheduled(net: Net, pairs: Pairs, watch: Watch) -> None:
    """One phase of finetuning-scheduler with the parameters that train."""
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    module = Module(net)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    phases = {0: {"params": names, "max_transition_epoch": 1}}
    with tempfile.TemporaryDirectory() as folder:
        save = FTSCheckpoint(dirpath=folder, monitor=None, save_top_k=0, save_on_train_epoch_end=False)
        phased = FinetuningScheduler(ft_schedule=phases, epoch_transitions_only=True, restore_best=False)
        trainer([phased, save, Steps(watch)], enable_checkpointing=True, default_root_dir=folder).fit(module, pairs)


class _Loss(nn.Module):
    """What HF Trainer calls: keywords in, a loss out."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(inputs), labels)}


def hf(net: Net, pairs: Pairs, watch: Watch) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watched(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=len(pairs), use_cpu=True, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant", per_device_train_batch_size=1,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(
            _Loss(net), settings, data_collator=itemgetter(0), train_dataset=_Labeled(pairs), callbacks=[Watched()],
            optimizers=(net.optimizer(), None),
        ).train()  # fmt: skip


class _Labeled(torch.utils.data.IterableDataset[Any]):
    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Any]:
        for inputs, targets in self.pairs:
            yield {**inputs, "labels": targets}


def fastai(net: Net, pairs: Pairs, watch: Watch) -> None:
    import fastai.callback.progress  # noqa: F401  (gives a Learner its no_bar)
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class Watched(Callback):
        def before_batch(self) -> None:
            watch.begin()

        def after_batch(self) -> None:
            watch.end()

    loaders = DataLoaders(pairs, [])
    wrapped = partial(OptimWrapper, opt=net.optimizer())
    learner = Learner(
        loaders, net, F.cross_entropy, opt_func=lambda *_, **__: wrapped(), cbs=[Watched()], train_bn=False,
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-5)


def crossft(build: Build, data: Any, last: int | None, steps: int, watch: Watch, cache: bool = False) -> None:
    from crossft.callbacks.caching import PrefixCache
    from crossft.callbacks.freezing import Freeze

    task = make(build, data, last)
    methods: list[Any] = [] if last is None else [Freeze(train_last=last)]
    methods += [PrefixCache()] if cache else []
    more = {"limit_train_batches": steps, "use_distributed_sampler": False}
    with tempfile.TemporaryDirectory() as folder, in_a_run(Path(folder) / "run") as (kept, settings):
        trainer([*methods, *kept, Steps(watch)], **{**settings, **more}, enable_checkpointing=True).fit(task, data)


PEERS = {
    "loop": loop, "Lightning": lightning, "HF Trainer": hf, "finetuning-scheduler": scheduled, "fastai": fastai
}  # fmt: skip


def turn(name: str, build: Build, data: Any, last: int | None, steps: int, watch: Watch) -> Watch:
    """One epoch of one of them."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if name.startswith("crossft"):
            crossft(build, data, last, steps, watch, name.endswith("cache"))
        else:
            PEERS[name](Net(build, data, last), Pairs(data, steps), watch)
    return watch


def measured(name: str, build: Build, data: Any, last: int | None, steps: int) -> tuple[float, float]:
    """Seconds of a step, and with loading."""
    return turn(name, build, data, last, steps, Watch()).seconds


def installed() -> list[str]:
    names = []
    for name in [*PEERS, "crossft"]:
        if name in LEFT_OUT and find_spec(LEFT_OUT[name]) is None:
            print(f"{name}: {MISSING}")
        else:
            names.append(name)
    return names


def working(names: list[str]) -> list[str]:
    """Those that run here: a peer's release may not go with the versions that are installed, and a line says so."""
    build, data = vision(16, 4, True)
    kept = []
    for name in names:
        try:
            turn(name, build, data, 0, WARM_UP + 1, Watch())
            kept.append(name)
        except Exception as error:
            if name in ("loop", "crossft"):
                raise
            print(f"{name}: left out, it fails here: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    return kept


def compare(name: str, make_case: Callable[[], tuple[Build, Any]], names: list[str], steps: int, rounds: int) -> None:
    """Print the ratios of one backbone."""
    build, own = make_case()
    _, other = make_case()
    steps += WARM_UP
    for mode, last in MODES.items():
        mine = [*names, *(["crossft + cache"] if last is not None else [])]
        if last is not None:  # fill it
            turn("crossft + cache", build, own, last, steps, Watch())
        things = {n: partial(measured, n, build, own if n.startswith("crossft") else other, last, steps) for n in mine}
        seconds = take_turns(things, rounds)
        base = seconds["loop"]
        for n in mine:
            step = median_ratio([s for s, _ in seconds[n]], [s for s, _ in base])
            epoch = median_ratio([e for _, e in seconds[n]], [e for _, e in base])
            took = statistics.median(s for s, _ in seconds[n]) * 1e3
            print(f"{name:19}{mode:8}{n:22}{took:10.1f} ms{step:10.3f}{epoch:10.3f}", flush=True)


def child(name: str, backbone: str) -> None:
    """Five full steps; print when the first ended and the largest memory."""
    quiet()
    first: list[float] = []
    watch = Watch(lambda step: first.append(time.time()))
    build, data = vision(160) if backbone == BACKBONES[0] else text(100)
    turn(name, build, data, None, 5, watch)
    print(json.dumps({"first": first[0], "peak": peak()}))


def starts(names: list[str], rounds: int) -> bool:
    """Print seconds to the first step, and memory; return whether the bound on memory holds."""

    def started(name: str, backbone: str) -> tuple[float, float]:
        begin = time.time()
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, backbone]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return found["first"] - begin, found["peak"]

    holds = True
    print(f"\n{'to the end of the first step':49}{'seconds':>10}{'ratio':>10}{'peak MB':>10}{'ratio':>10}")
    for backbone in BACKBONES:
        chosen = names if backbone == BACKBONES[0] else [n for n in names if n in ("loop", "crossft")]
        found = take_turns({n: partial(started, n, backbone) for n in chosen}, rounds)
        for n in chosen:
            seconds, memory = (statistics.median(v) for v in zip(*found[n], strict=True))
            slower = median_ratio([s for s, _ in found[n]], [s for s, _ in found["loop"]])
            more = median_ratio([p for _, p in found[n]], [p for _, p in found["loop"]])
            holds &= n != "crossft" or more <= MAX_MEMORY
            print(f"{backbone:19}{'full':8}{n:22}{seconds:10.1f}{slower:10.2f}{memory:10.0f}{more:10.3f}", flush=True)
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="0: only the processes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="rounds of processes; 0: none")
    parser.add_argument("--wall", action="store_true", help="seconds on the wall")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    if args.wall:
        os.environ["BENCH_WALL"] = "1"
    quiet()
    names = installed()
    rows = args.batch * (args.steps + WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CROSSFT_CACHE"] = folder
        names = working(names)
        if args.steps:
            print(f"{'ratios to the loop':49}{'a step':>13}{'step':>10}{'epoch':>10}")
            compare(BACKBONES[0], lambda: vision(rows, args.batch, True), names, args.steps, args.rounds)
            compare(BACKBONES[1], lambda: text(2 * rows, args.batch), names, args.steps, args.rounds)
    return 0 if not args.starts or starts(names, args.starts) else 1


if __name__ == "__main__":
    sys.exit(main())
