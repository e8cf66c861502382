"""Two processes against one: every kind of label, rows split unevenly, and a process that saw none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from crossft.metrics import confusion, domain_metrics
from crossft.types import Domain

DOMAINS = (
    Domain("photo", "source", labels=("a", "b", "c", "d")),
    Domain("tags", "target", kind="multilabel", labels=("x", "y", "z")),
    Domain("stars", "target", kind="regression", labels=("stars",)),
)
FIRST = {"all": 41, "uneven": 9, "none": 0, "not even an update": -1}  # rows of rank 0 out of 41


def rows(domain: Domain) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(41, max(1, len(domain.labels)), generator=generator)
    if domain.kind == "multiclass":
        return logits.softmax(1), torch.randint(0, 3, (41,), generator=generator)  # "d" is absent
    if domain.kind == "multilabel":
        return logits.sigmoid(), torch.randint(0, 2, (41, 3), generator=generator)
    return logits[:, 0], (logits[:, 0] + torch.randn(41, generator=generator)) * 3 + 100


def measure(rank: int | None, thresholds: int | None) -> dict[str, Tensor]:
    found = {}
    for domain in DOMAINS:
        for case, first in FIRST.items():
            metrics = domain_metrics(domain, thresholds=thresholds)
            tables = [] if domain.kind == "regression" else [confusion(domain)]
            preds, targets = rows(domain)
            if rank is not None:
                part = slice(None, max(first, 0)) if rank == 0 else slice(max(first, 0), None)
                preds, targets = preds[part], targets[part]
            if first >= 0 or len(preds):
                for metric in (metrics, *tables):
                    metric.update(preds[:5], targets[:5])
                    metric.update(preds[5:], targets[5:])
            for name, value in metrics.compute().items():
                found[f"{domain.name}/{case}/{name}"] = value
            for table in tables:
                found[f"{domain.name}/{case}/confusion"] = table.compute()
    return found


def process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save([measure(rank, thresholds) for thresholds in (None, 50)], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.start_processes(process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    alone = [measure(None, thresholds) for thresholds in (None, 50)]
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, two in zip(alone, together):
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7, msg=f"{name} on rank {rank}")
