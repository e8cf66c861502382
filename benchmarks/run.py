"""Run the benchmarks and write what they print to `benchmarks/RESULTS.md`, with date and versions.

    python benchmarks/run.py [NAME ...]

Without names all of them run (about 20 minutes on an idle machine); with names those sections are written anew and the
others stay as they are. A benchmark whose bound does not hold says so in its heading.
"""

from __future__ import annotations

import datetime
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from timing import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
SECTIONS = {
    "step": ("A step's own cost", "step_overhead.py --pairs 20 --steps 400"),
    "start": ("Start to the first step", "start.py --pairs 3"),
    "cache": ("The frozen-prefix cache", "prefix_cache.py --rows 512 --texts 224 --rounds 2"),
    "peers": ("Beside the peers", "peers.py --steps 4 --rounds 2 --starts 0"),
    "memory": ("Start-up and memory beside the peers", "peers.py --steps 0 --starts 1"),
    "scaling": ("Methods, processes, samples, stages, domains", "scaling.py --rounds 3"),
    "compile": ("torch.compile", "compiled.py"),
    "importance": ("Importance and penalties", "importance.py"),
    "compare": ("Comparing 500 run folders", "compare_folders.py"),
    "sharing": ("Six methods that share a source model", "shared_prefix.py --slots 1"),
}
HEAD = """# Benchmarks

Written by `make bench` (`python benchmarks/run.py`; with a section's name for that one alone), not edited by hand.
Each section has its date, versions and command; the head of its script says what it measures. One thread a process.
"""


def section(name: str) -> str:
    """Run one benchmark and return its text."""
    title, command = SECTIONS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    load, start = os.getloadavg()[0], time.perf_counter()
    script, *rest = shlex.split(command)
    lines = []
    with subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", str(HERE / script), *rest],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    took = time.perf_counter() - start
    printed = "".join(lines).strip("\n")
    if not printed:
        raise SystemExit(f"benchmarks/{command} printed nothing (exit {process.returncode})")
    verdict = "" if process.returncode == 0 else " — a bound does not hold"
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"## {name}: {title}{verdict}\n\n{today}, {took:.0f} s, load {load:.1f} before. {machine()}\n\n"
        f"    python benchmarks/{command}\n\n"
        f"```\n{printed}\n```\n"
    )


def main() -> int:
    names = sys.argv[1:] or list(SECTIONS)
    unknown = [n for n in names if n not in SECTIONS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; allowed: {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    parts = {m[1]: m[0] for m in re.finditer(r"^## (\w+): .*?(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)}
    for name in names:
        parts[name] = section(name)
        text = "\n".join([HEAD, *(parts[n].strip() + "\n" for n in SECTIONS if n in parts)])
        RESULTS.write_text(text, encoding="utf-8")
    return 1 if any("does not hold" in part for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
