"""Every family with and without the cache, in one or two processes (torchrun). See ``test_cache_families.py``."""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from backbones.tiny_models import tiny_text, tiny_timm
from callbacks.caching.cached_runs import fit, image_data, text_data
from lightning.pytorch.strategies import DDPStrategy
from tiny import flat

from crossft.callbacks.caching import PrefixCache

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
VISION = ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224"]
TEXT = ["bert", "distilbert", "roberta", "deberta-v2"]
MODES: dict[str, Any] = {"probe": 0, "last-2": 2, "schedule": {0: 0, 2: 1, 4: 2, 6: 3}}
"""Stages that train; the schedule has four phases of half an epoch: eight steps of 8 rows in all."""
Cell = tuple[str, str, int]


def cells(every: bool) -> list[Cell]:
    """(family, mode, accumulation): all of them, or those in which each pair of values occurs."""
    found = list(product([*VISION, *TEXT], MODES, (1, 2)))
    families, modes = [*VISION, *TEXT], list(MODES)
    return [c for c in found if every or (families.index(c[0]) + modes.index(c[1])) % 2 == c[2] - 1]


def trained(folder: Path, cell: Cell, cache: PrefixCache | None) -> torch.Tensor:
    """Weights after two epochs."""
    family, mode, accumulation = cell
    rows = 8 // (WORLD * accumulation)
    if family in VISION:
        data, build = image_data(folder / "images", batch_size=rows), partial(tiny_timm, family)
    else:
        data, build = text_data(folder, batch_size=rows), partial(tiny_text, family, folder / family)
    task, _ = fit(
        data, MODES[mode], cache, build, task_options={"batchnorm": "frozen"}, accumulate_grad_batches=accumulation,
        max_epochs=2, limit_val_batches=0, devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 else "auto",
    )  # fmt: skip
    return flat(task)


def main(folder: Path, every: bool) -> None:
    results: dict[str, Any] = {}
    for cell in cells(every):
        cache = PrefixCache()
        plain, cached = trained(folder, cell, None), trained(folder, cell, cache)
        results["/".join(map(str, cell))] = {
            "off": float((cached - plain).abs().max()),
            "weights": cached,
            "hits": cache.hits,
        }
    torch.save(results, folder / f"families-{WORLD}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "every")
