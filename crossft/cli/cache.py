"""``crossft cache ls|rm``: the stored activations of frozen prefixes; imports no torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from crossft.errors import ConfigError
from crossft.runs import StoredPrefix, prefix_folder, remove_prefixes, stored_prefixes

__all__ = ["run"]

DAY = 86_400.0


def run(command: str, arguments: list[str]) -> int:
    """List what is stored, or remove some of it."""
    options = _parser().parse_args(arguments)
    if options.action == "ls":
        return _list(stored_prefixes())
    keys = list(options.keys)
    if options.all:
        keys += [p.key for p in stored_prefixes()]
    if options.days is not None:
        keys += [p.key for p in stored_prefixes() if p.used < time.time() - options.days * DAY]
    if not keys and not options.all and options.days is None:
        raise ConfigError("crossft cache rm: name keys of `crossft cache ls`, or pass --all or --unused DAYS")
    gone = remove_prefixes(keys)
    print(f"removed {len(gone)} of {len(gone) + len(stored_prefixes())} prefixes, {_size(sum(p.bytes for p in gone))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "crossft cache",
        description="The activations that crossft.callbacks.caching.PrefixCache stores, one line a frozen prefix.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|rm")
    actions.add_parser("ls", help="list them, the last used first")
    remove = actions.add_parser("rm", help="remove some; a run that reads them goes on and computes anew")
    remove.add_argument("keys", nargs="*", metavar="KEY", help="key of a prefix, or a unique beginning of it")
    remove.add_argument("--all", action="store_true", help="all of them")
    remove.add_argument("--unused", dest="days", type=float, metavar="DAYS", help="those no run has opened for so long")
    return parser


def _list(prefixes: Sequence[StoredPrefix]) -> int:
    rows = [("key", "backbone", "enters", "rows", "size", "used")]
    for p in prefixes:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(p.used)) if p.used else "?"
        rows.append((p.key, p.backbone, p.stage, f"{p.rows}", _size(p.bytes), used))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(prefixes)} prefixes, {_size(sum(p.bytes for p in prefixes))}, under {prefix_folder()}")
    return 0


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
