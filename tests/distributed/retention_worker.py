"""Runs in one or two processes (torchrun): every method of retention. See ``test_retention_equality.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from retention_cases import CASES, data_of, fit, recalling
from tiny import TinyVision, flat

from crossft.callbacks.retention.importance import Measure
from crossft.tasks import Classification

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MEASURES = {
    "exact": Measure(),
    "chunks": Measure(chunk=5),
    "sampled": Measure(labels="sampled", draws=3),
    "some": Measure(labels="empirical", samples=17),
    "mas": Measure("mas"),
}


def main(root: Path, out: Path) -> None:
    results: dict[str, torch.Tensor] = {}
    for name, case in CASES.items():
        for accumulation in (1, 2) if case.rows and WORLD == 1 else (1,):
            data = data_of(root, accumulation, target=case.target)
            make = {"batchnorm": case.batchnorm}
            _, task = fit(data, {name: case.make(case.weight)}, accumulation, **make)
            results[f"{name}/{accumulation}"] = flat(task)
            if case.batchnorm:  # running statistics are each process's own until the next forward
                results[f"{name}/{accumulation}"] = torch.cat([p.detach().flatten() for p in task.parameters()])
            for method, term in task.attachments._all().items():
                shown = {k: v for k, v in term.state_dict().items() if k.startswith(("importance", "logits", "path"))}
                if shown:
                    results[f"{method}/state"] = torch.cat([v.double().flatten() for v in shown.values()])
    results["recadam/1"] = flat(fit(data_of(root), {}, optimizer=recalling)[1])
    data = data_of(root)
    trainer, _ = fit(data, {}, max_steps=1)
    assert trainer.world_size == WORLD
    torch.manual_seed(3)
    task = Classification(TinyVision(), list(data.domains))
    for name, measure in MEASURES.items():
        found = measure.run(task, data)
        results[f"importance/{name}"] = torch.cat([v.double().flatten() for v in found.values.values()])
        results[f"rows/{name}"] = torch.tensor(found.provenance["rows"])
    torch.save(results, out / f"retention-{WORLD}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
