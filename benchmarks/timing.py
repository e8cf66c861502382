"""What the benchmarks share: turns taken by several things, medians, and what the machine is."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

__all__ = ["MISSING", "clock", "machine", "median_ratio", "peak", "take_turns"]

T = TypeVar("T")
MISSING = "not installed, left out"
PACKAGES = ("torch", "lightning", "timm", "transformers", "finetuning-scheduler", "fastai", "crossft")


def clock() -> float:
    """Seconds: of the processor (all threads), or on the wall where BENCH_WALL is set."""
    return time.perf_counter() if os.environ.get("BENCH_WALL") else time.process_time()


def take_turns(things: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run every thing once a round, so that what disturbs the machine disturbs all; results by name, a round each."""
    results: dict[str, list[T]] = {name: [] for name in things}
    for number in range(rounds):
        names = list(things)
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(things[name]())
    return results


def median_ratio(mine: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(m / b for m, b in zip(mine, base, strict=True))


def peak() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def machine() -> str:
    """One line: interpreter, processors, versions of what is compared."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    return f"Python {platform.python_version()}, {os.cpu_count()} processors, {', '.join(found)}"
