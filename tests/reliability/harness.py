"""Kills runs with SIGKILL, resumes them, and compares them with runs that nobody stopped.

A program of its own: it imports everything once and forks each process of each run, so that a kill costs the training
and not ten seconds of imports. Arguments: a folder, the number of kills, and ``sequences`` for chains of legs, or the
number of kills of gradually unfrozen runs (18: in each of four phases at an epoch boundary and within an epoch, and
where a phase begins, on two grids). Prints one JSON line a kill.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from backbones.tiny_models import text_folder
from tiny import image_domains

import crossft.callbacks.adaptation
import crossft.callbacks.retention
import crossft.cli.fit  # noqa: F401 (imported before forking)
from crossft.backbones import Timm
from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.runs import RunFolder, read_json, read_metrics

CELLS = list(product(("vision", "text"), (0, 2), (1, 2), (1, 2)))  # modality, workers, accumulation, processes
PHASED = [("phases", 0, 1, 1), ("phases", 2, 2, 2)]  # vision, gradually unfrozen in four phases
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "terms", "global_step", "callbacks")
EPOCHS = {"vision": 2, "text": 2, "phases": 8}
PHASES = [
    {"train_last": 0, "epochs": 2},
    {"train_last": 2, "share": 0.25, "rates": "rewarm", "warmup": 3, "moments": "reset"},
    {"kinds": ["norm"], "patience": 1, "restore_best": True, "lr": 0.5},
    {"rates": "restart"},
]


def config(folder: Path, modality: str, workers: int, accumulation: int, world: int) -> Path:
    """A tiny run with dropout, batch statistics, two methods, a schedule and augmentation."""
    name, init = "Timm", {"name": "test_resnet", "weights": None, "image_size": 32}
    if modality == "text":
        name, init = "Transformer", {"name": str(folder / "bert"), "weights": None, "max_length": 16}
    task = {
        "backbone": {"class_path": f"crossft.backbones.{name}", "init_args": init},
        "schedule": {"class_path": "crossft.optim.Cosine", "init_args": {"warmup": 2}},
        "head_dropout": 0.2,
    }
    methods = {
        "dann": {"class_path": "crossft.callbacks.adaptation.DANN", "init_args": {"hidden": 8}},
        "l2sp": {"class_path": "crossft.callbacks.retention.L2SP"},
    }
    if modality == "phases":
        methods["unfreeze"] = {
            "class_path": "crossft.callbacks.freezing.GradualUnfreezing",
            "init_args": {"phases": PHASES, "monitor": "source/val/loss", "mode": "min", "min_delta": 10.0},
        }
        methods["sentinel"] = {"class_path": "crossft.callbacks.freezing.RankSentinel"}
    trainer = {
        "max_epochs": EPOCHS[modality], "accelerator": "cpu", "devices": world, "accumulate_grad_batches": accumulation,
        "strategy": "ddp" if world > 1 else "auto", "log_every_n_steps": 1, "enable_progress_bar": False,
        "callbacks": [{"class_path": "killing.Seen"}, {"class_path": "killing.KillAt"}],
    }  # fmt: skip
    data = {
        "root": str(folder / ("text" if modality == "text" else "vision")), "source": "one", "target": "two",
        "train_on": "source", "target_labels": "none", "batch_size": 4, "num_workers": workers, "augment": "flip",
    }  # fmt: skip
    whole = {
        "experiment": "kill", "model": {"class_path": "crossft.tasks.Classification", "init_args": task}, "data": data,
        "trainer": trainer, "methods": methods, "checkpoints": {"every_n_steps": 2}, "wandb": {"mode": "disabled"},
    }  # fmt: skip
    if modality == "vision":  # what watches and what chooses is resumed too
        monitoring = "crossft.callbacks.monitoring"
        health = {"every_n_steps": 2, "rows": 20, "maps": []}
        trainer["callbacks"] += [{"class_path": f"{monitoring}.Scores"}]
        methods["health"] = {"class_path": f"{monitoring}.Health", "init_args": health}
        whole["select"] = {"metric": "target/val/infomax", "oracle": True}
        data["splits"], data["split"] = [0.6, 0.2, 0.2], "stratified"
    path = folder / f"{modality}-{workers}-{accumulation}-{world}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def make_data(folder: Path) -> None:
    image_domains(folder / "vision", domains=("one", "two", "three"), each=24, size=32)
    text_folder("bert", folder / "bert")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for domain in ("one", "two"):
        lines = ["text,label"]
        for i in range(48):
            words = [f"w{w}" for w in rng.integers(0, 36, rng.integers(3, 12))]
            lines.append(f"{' '.join(words)},{('bad', 'good')[i % 2]}")
        (folder / "text" / f"{domain}.csv").write_text("\n".join(lines) + "\n")


def launched(world: int, environment: dict[str, str], act: Callable[[], int]) -> int:
    """Run ``act`` in ``world`` forked processes of one process group; the exit code of the first, or -signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            os.environ.update(environment)
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "kill"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.stdout = sys.stderr
            torch.set_num_threads(1)  # makes the pool of threads anew, which two of autograd's would race for
            try:
                code = act()
            except BaseException:
                traceback.print_exc()
                code = 70
            os._exit(code)
        children.append(child)
        os.setpgid(child, children[0])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0]


def run(
    cell: tuple[str, int, int, int], path: Path, folder: Path, seen: Path, kill: str = "", root: Path | None = None
) -> None:
    """Fit into ``folder``, or below ``root``; with ``kill``, until the run is killed, then resume it to its end."""
    fit = ["fit", "--allow", "killing", "--config", str(path)]
    if root is not None:
        folder = root / "run"
        fit += ["--run.root", str(root)]
    fit += ["--run.dir", str(folder)]
    environment = {"SEEN": str(seen), "KILL_AT": kill}
    code = launched(cell[3], environment, lambda: main(fit))
    if kill:
        assert code == -signal.SIGKILL, f"{cell} was to be killed at {kill} and ended with {code}"
        environment["KILL_AT"] = ""
        resume = ["resume", str(folder), "--allow", "killing"]
        code = launched(cell[3], environment, lambda: main(resume))
    assert code == 0, f"{cell} ended with {code}"


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two nested values differ in a bit, or None."""
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else where
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {a.keys() ^ b.keys()}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}/{k}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)}"
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}/{i}"))), None)
    return None if a == b or (a != a and b != b) else f"{where}: {a} and {b}"


def samples(seen: Path) -> dict[str, dict[str, Any]]:
    """What each process saw: sample ids of micro-batches, what trained at each step; repetitions must be the same."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(seen.iterdir()):
        rows = found.setdefault(file.name, {})
        for line in file.read_text().splitlines():
            step, micro, ids = json.loads(line)
            assert rows.setdefault(f"{step}/{micro}", ids) == ids, f"{step}/{micro}: not the same after the resume"
    return found


def compare(reference: Path, folder: Path, seen: tuple[Path, Path]) -> str | None:
    """What differs between the run nobody stopped and the one that was killed, or None."""
    first, second = (load_checkpoint(f / "checkpoints" / "last.ckpt") for f in (reference, folder))
    for checkpoint in (first, second):
        checkpoint["callbacks"]["Checkpoints"].pop("wandb_id")  # the run's own
    for part in COMPARED:
        if found := difference(first[part], second[part], part):
            return found
    if samples(seen[0]) != samples(seen[1]):
        return "the samples seen, or what trained"
    metrics = [repr(read_metrics(RunFolder(f).metrics)) for f in (reference, folder)]
    if metrics[0] != metrics[1]:
        return "metrics.csv"
    results = [RunFolder(f).summary()["metrics"] for f in (reference, folder)]
    return difference(results[0], results[1], "summary")


def plan(kills: int, steps: dict[tuple[str, int, int], int]) -> list[tuple[tuple[str, int, int, int], str]]:
    """Cells and kill points: every cell once where there are enough, the named points first, then random ones."""
    draw = random.Random(20261122)
    cells = CELLS if kills >= len(CELLS) else [CELLS[7], CELLS[9]]
    cells = (cells * kills)[:kills]
    draw.shuffle(cells)  # so that the named points meet text, workers and processes
    points = []
    for i, cell in enumerate(cells):
        epochs = EPOCHS[cell[0]]
        epoch = steps[cell[0], cell[2], cell[3]] // epochs * cell[2]  # micro-batches of an epoch
        named = {
            0: f"backward:{epoch + 1}",  # first step of an epoch
            1: "epoch_end:1",
            2: f"backward:{epoch}",  # last step
            3: f"backward:{epoch // 2}",  # a middle one
            4: "epoch_start:2",
        }
        points.append((cell, named.get(i) or f"backward:{draw.randint(1, epochs * epoch)}"))
    return points


LEGS = ("source", "two", "three")
INSIDE = [("three", "importance:2"), ("two", "backward:3"), ("source", "train_end:1")]
"""Where a sequence is killed first: in a pass for importance, within a leg, between a leg's last save and its end."""


def sequence_config(folder: Path, world: int) -> Path:
    """A chain of three domains with everything that is carried from leg to leg."""
    path = config(folder, "vision", 0, 1, world)
    whole = yaml.safe_load(path.read_text())
    names = {"ewc": "EWC", "online": "OnlineEWC", "mas": "MAS", "si": "SI", "replay": "Replay", "agem": "AGEM"}
    methods = {n: {"class_path": f"crossft.callbacks.retention.{name}"} for n, name in names.items()}
    methods["replay"]["init_args"] = {"size": 10, "share": 0.25}
    whole |= {"experiment": "sequence", "sequence": ["one", *LEGS[1:]], "methods": methods, "select": {}}
    del whole["trainer"]["callbacks"][2:]
    whole["source_leg"] = {"methods": {"si": methods["si"]}}
    whole["model"]["init_args"]["batchnorm"] = "frozen"  # a last batch may hold one row
    whole["data"] = {k: whole["data"][k] for k in ("root", "batch_size", "augment")} | {"batch_size": 8}
    path = folder / f"sequence-{world}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def sequences(folder: Path, kills: int) -> None:
    """Kill chains in every leg; each must end in every leg's bits, and in the same matrix."""
    make_data(folder)
    Timm("test_resnet", weights=None, image_size=32)
    draw = random.Random(20261124)
    others = [(leg, f"{what}:{n}") for leg in LEGS for what, n in (("epoch_start", 2), ("epoch_end", 2))]
    points = [*INSIDE, *others, *((draw.choice(LEGS), f"backward:{draw.randint(1, 6)}") for _ in range(kills))][:kills]
    for number, (leg, point) in enumerate(points):
        world = 1 + (number % 2 if kills > len(INSIDE) else 0)
        cell, roots = ("sequence", 0, 1, world), [folder / f"reference-{world}", folder / f"killed-{number}"]
        seen = tuple(Path(f"{root}-seen") for root in roots)
        if not roots[0].exists():
            run(cell, sequence_config(folder, world), roots[0], seen[0], root=roots[0])
        started = time.monotonic()
        run(cell, sequence_config(folder, world), roots[1], seen[1], f"{leg}/{point}", root=roots[1])
        legs = [[next(root.glob("sequence/source-*")), root / "run/1-two", root / "run/2-three"] for root in roots]
        found = next((d for a, b in zip(*legs) if (d := compare(a, b, seen))), None)
        matrices = [read_json(root / "run" / "sequence.json") for root in roots]
        found = found or difference(*({k: v for k, v in m.items() if k != "runs"} for m in matrices), "sequence.json")
        row = {"cell": cell, "kill": f"{leg}/{point}", "difference": found}
        print(json.dumps({**row, "seconds": round(time.monotonic() - started, 1)}), flush=True)


def phase_plan(cell: tuple[str, int, int, int], reference: Path) -> list[tuple[tuple[str, int, int, int], str]]:
    """Kill points in every phase, within an epoch and where one begins inside of the phase; and one at a change."""
    steps = load_checkpoint(reference / "checkpoints" / "last.ckpt")["global_step"]
    with (reference / "ledger.csv").open(newline="") as file:
        starts = sorted({int(row["step"]) for row in csv.DictReader(file)})
    assert len(starts) == len(PHASES), starts
    epoch = steps // EPOCHS["phases"]
    points = []
    for start, end in zip(starts, [*starts[1:], steps]):
        middle = next(s for s in range((start + end) // 2, end) if s % epoch)
        boundary = next(s for s in range(start + 1, end) if s % epoch == 0)
        points += [f"backward:{middle * cell[2] + 1}", f"epoch_start:{boundary // epoch + 1}"]
    return [(cell, point) for point in [*points, f"epoch_start:{starts[1] // epoch + 1}"]]


def everything(folder: Path, kills: int, phase_kills: int) -> None:
    make_data(folder)
    Timm("test_resnet", weights=None, image_size=32)  # what imports lazily is imported before the forks
    references: dict[tuple[str, int, int], Path] = {}
    wanted = CELLS if kills >= len(CELLS) else [CELLS[7], CELLS[9]]
    phased = PHASED if phase_kills > 9 else PHASED[1:] if phase_kills else []
    for modality, _, accumulation, world in [*(wanted if kills else []), *phased]:
        key = (modality, accumulation, world)
        if key not in references:
            references[key] = folder / "-".join(map(str, ("reference", *key)))
            cell = (modality, 0, accumulation, world)
            run(cell, config(folder, *cell), references[key], Path(f"{references[key]}-seen"))
    steps = {k: load_checkpoint(p / "checkpoints" / "last.ckpt")["global_step"] for k, p in references.items()}
    points = [p for cell in phased for p in phase_plan(cell, references[cell[0], cell[2], cell[3]])]
    if phase_kills < len(points):
        points = random.Random(20261124).sample(points, phase_kills)
    for number, (cell, kill) in enumerate([*plan(kills, steps), *points]):
        started = time.monotonic()
        mine = folder / f"killed-{number}"
        reference = references[cell[0], cell[2], cell[3]]
        run(cell, config(folder, *cell), mine, Path(f"{mine}-seen"), kill)
        found = compare(reference, mine, (Path(f"{reference}-seen"), Path(f"{mine}-seen")))
        row = {"cell": cell, "kill": kill, "difference": found, "seconds": round(time.monotonic() - started, 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    kills = int(sys.argv[2]) if len(sys.argv) > 2 else len(CELLS) + 4
    if sys.argv[3:] == ["sequences"]:
        sequences(where, kills)
    else:
        everything(where, kills, int(sys.argv[3]) if len(sys.argv) > 3 else 0)
