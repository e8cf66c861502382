"""Runs in one or two processes (torchrun): trains with every method. See ``test_adaptation_equality.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from adaptation_cases import CASES, SWAD_CASE, WORLD, data_of, fit
from lightning.pytorch import Callback
from tiny import TinyVision, flat
from torch import nn

from crossft.callbacks.adaptation import CORAL, Tent
from crossft.callbacks.freezing import DomainGap
from crossft.callbacks.monitoring import Health
from crossft.callbacks.monitoring.scores import SCORES, Scores
from crossft.functional import gather_rows, mean_over_processes


def gathered(rank: int) -> dict[str, torch.Tensor]:
    """Gradients through the gather where rank 0 has three rows and rank 1 two, by DDP's own average."""
    whole = torch.arange(10.0).view(5, 2).sin().double()
    mine = whole if WORLD == 1 else (whole[:3], whole[3:])[rank]
    layer = nn.Linear(2, 3).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    model = nn.parallel.DistributedDataParallel(layer) if WORLD > 1 else layer
    (rows,) = gather_rows(model(mine))
    labels = gather_rows(torch.arange(5) if WORLD == 1 else (torch.arange(3), torch.arange(3, 5))[rank])[0]
    rows.cov().square().sum().backward()
    found = {"rows": rows.detach(), "labels": labels, **{n: p.grad.clone() for n, p in layer.named_parameters()}}
    layer.zero_grad()
    # each process holds the sum of its rows over half of all rows: the mean over processes is the mean over rows
    share = model(mine).sum(0) / (5 / WORLD)
    mean_over_processes(share).square().sum().backward()
    return found | {f"mean/{n}": p.grad.clone() for n, p in layer.named_parameters()}


def adabn(root: Path) -> torch.Tensor:
    """The statistics that a fit on the source ends with."""
    torch.manual_seed(3)
    net = TinyVision(batchnorm=True)
    fit(data_of(root, False, eval_batch_size=8 // WORLD), {}, backbone=net, batchnorm="reestimated")
    return net.middle[1].running_mean


def tent(root: Path, *methods: Callback) -> torch.Tensor:
    """Test loss on the target of a model with LayerNorm, whose scales follow each batch."""
    torch.manual_seed(3)
    net = TinyVision()
    net.last = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh())
    data = data_of(root, False, eval_batch_size=4 // WORLD)
    trainer, task = fit(data, {}, backbone=net, extra=methods)
    trainer.test(task, data, verbose=False)
    return trainer.callback_metrics["target/test/loss"]


def main(root: Path, out: Path) -> None:
    results: dict[str, torch.Tensor] = {}
    for accumulation in (1, 4 // WORLD):
        for name, case in {**CASES, "swad": SWAD_CASE}.items():
            if accumulation > 1 and not case.rows:
                continue
            more = {"limit_val_batches": 1.0, "val_check_interval": 2 * accumulation} if name == "swad" else {}
            data = data_of(root, case.sources, accumulation)
            _, task = fit(data, {name: case.make(case.weight)}, accumulation, **more)
            results[f"{name}/{accumulation}"] = flat(task)
            kept = [t.detach().double().reshape(-1) for t in task.attachments.state_dict().values()]
            results[f"{name}/{accumulation}/term"] = torch.cat([torch.zeros(1), *kept])
    more = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    data = data_of(root, False, splits=(0.4, 0.4, 0.2))
    health = Health(1, maps=[])
    trainer, _ = fit(data, {"coral": CORAL(100.0)}, extra=(Scores(), health, DomainGap()), **more)
    gradients = {key: torch.tensor(value) for key, value in health.gradients.items()}
    for key, value in {**trainer.callback_metrics, **gradients}.items():
        if key.startswith(("health/", "gap/")) or key.removeprefix("target/val/") in SCORES:
            results[f"scores/{key}"] = value.double()
    for sources in (False, True):
        results[f"none-{sources}/1"] = flat(fit(data_of(root, sources), {})[1])
    results |= {"adabn": adabn(root), "tent": tent(root, Tent(lr=0.05)), "no tent": tent(root)}
    rank = int(os.environ.get("RANK", "0"))
    results |= {f"gather/{k}": v for k, v in gathered(rank).items()}
    torch.save(results, out / f"results-{WORLD}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
