"""Runs in one or two processes (torchrun), with and without the cache. See ``test_cache_processes.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from callbacks.caching.cached_runs import fit, image_data
from lightning.pytorch.strategies import DDPStrategy
from tiny import TinyVision, flat

from crossft.callbacks.adaptation import DANN
from crossft.callbacks.caching import PrefixCache

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CASES: dict[str, tuple[Any, int]] = {
    "probe/1": (0, 1),
    "probe/2": (0, 2),
    "last-1/1": (1, 1),
    "last-2/2": (2, 2),
    "schedule/1": ({0: 0, 3: 1, 5: 2, 7: 3}, 1),
    "schedule/2": ({0: 0, 2: 1, 3: 2, 4: 3}, 2),
}


def equality(root: Path, out: Path) -> None:
    """Every case without a cache, with an empty one, and with a full one; then one in memory."""
    results: dict[str, Any] = {}
    for case, (phases, accumulation) in CASES.items():
        for kind in ("plain", "cold", "warm", "memory"):
            if kind == "memory" and case != "last-1/1":
                continue
            data = image_data(root, batch_size=16 // (WORLD * accumulation))
            cache = None if kind == "plain" else PrefixCache(where="memory" if kind == "memory" else "disk")
            methods = [DANN(hidden=4)] if case.startswith("last") else []
            task, trainer = fit(
                data, phases, cache, TinyVision, methods=methods, accumulate_grad_batches=accumulation, devices=WORLD,
                strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 else "auto",
            )  # fmt: skip
            trainer.test(task, data, verbose=False)
            results[f"{case}/{kind}"] = flat(task)
            results[f"{case}/{kind}/metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
            if cache is not None:
                results[f"{case}/{kind}/counts"] = torch.tensor([cache.hits, cache.misses])
    torch.save(results, out / f"cache-{WORLD}-{os.environ.get('RANK', '0')}.pt")


def killed(root: Path, caches: Path, write: int) -> None:
    """A run on the cache ``caches/WRITE``, killed in the middle of that write."""
    os.environ["CROSSFT_CACHE"] = str(caches / str(write))
    original, count = os.pwrite, [0]

    def pwrite(file: int, data: bytes, at: int) -> int:
        count[0] += 1
        if count[0] == write:
            original(file, data[: len(data) // 2], at)
            os.kill(os.getpid(), 9)
        return original(file, data, at)

    os.pwrite = pwrite
    fit(image_data(root), 1, PrefixCache())


if __name__ == "__main__":
    if sys.argv[1] == "equality":
        equality(Path(sys.argv[2]), Path(sys.argv[3]))
    for write in sys.argv[4:]:
        child = os.fork()
        if not child:
            killed(Path(sys.argv[2]), Path(sys.argv[3]), int(write))
            os._exit(1)
        if os.waitpid(child, 0)[1] != 9:
            sys.exit(f"the run was not killed at write {write}")
