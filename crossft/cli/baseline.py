"""``crossft baseline RUN...``: what simple classifiers reach on exactly a run's splits and training labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from crossft.callbacks.retention.rehearsal import seen_by
from crossft.cli.parser import Settings
from crossft.cli.saved import read_splits
from crossft.cli.screen import print_table, quiet_lightning
from crossft.data import DomainData
from crossft.data.prepare import Prepared, first_rows
from crossft.errors import ConfigError, RunError
from crossft.metrics import domain_metrics, primary_metric
from crossft.metrics.baselines import Labeled, frozen_features, tfidf
from crossft.reports.records import find_runs
from crossft.runs import RunFolder
from crossft.tasks import Task
from crossft.tasks.evaluation import display_names
from crossft.types import Batch

__all__ = ["baselines", "run"]


def run(command: str, arguments: list[str]) -> int:
    """Measure the baselines of each run, print them beside the run, and write them into its summary."""
    words = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    if not words or any("=" not in f for f in flags):
        raise ConfigError("usage: crossft baseline RUN ... [--KEY=VALUE ...]: name run folders, or folders of runs")
    quiet_lightning()
    known: dict[str, dict[str, float]] = {}
    for path in find_runs(words):
        folder = RunFolder.open(path)
        if folder.summary()["status"] != "finished":
            print(f"{path}: passed over, it is not finished (baselines read test labels)")
            continue
        settings, data = _opened(folder, flags)
        plain = settings.plain()
        place = json.dumps([data.fingerprint, list(data.training_domains), plain["model"]["init_args"]["backbone"]])
        if place not in known:
            known[place] = baselines(settings, data)
        _show(folder, known[place])
    return 0


def _opened(folder: RunFolder, flags: Sequence[str]) -> tuple[Settings, DomainData]:
    """The run's config, and its data with its splits and label names."""
    if not folder.config.is_file():
        raise RunError(f"{folder.config} is missing; without the run's config its data cannot be read again")
    settings = Settings(["--config", str(folder.config), *flags], "baseline")
    data: DomainData = settings.build("data").data
    if (splits := read_splits(folder)) is not None:
        data.use_manifest(splits)
    data.prepare()
    return settings, data


def baselines(settings: Settings, data: DomainData) -> dict[str, float]:
    """``baseline/NAME/DOMAIN/test/METRIC`` of every domain that shares a label space with the training labels.

    Args:
        settings: of a run; its backbone is built with its pretrained weights, as it is before any training.
        data: of the run, prepared.

    Raises:
        ConfigError: the training domains have no labels.
    """
    found: dict[str, float] = {}
    spaces = {d.space for d in data.domains if d.name in data.training_domains}
    task = _backbone(settings, data)
    features = _features(task, data)
    for space in sorted(spaces, key=str):
        parts = [(p, x) for p, x in zip(data.prepared, features) if p.domain.space == space]
        taught = [(p, x) for p, x in parts if p.domain.name in data.training_domains]
        domain = parts[0][0].domain
        tests = [(p, x, _rows(p, "test")) for p, x in parts]
        frozen = frozen_features(
            _labeled(taught, "train"), [x[r] for _, x, r in tests], domain, _labeled(taught, "val")
        )
        by_name = {"frozen": frozen}
        if parts[0][0].modality == "text":
            texts = [(p, _texts(p)) for p, _ in parts]
            words = [(p, t) for p, t in texts if p.domain.name in data.training_domains]
            by_name["tfidf"] = tfidf(
                _labeled(words, "train"), [t[r] for (_, t), (_, _, r) in zip(texts, tests)], domain
            )
        for name, predictions in by_name.items():
            for (p, _, rows), predicted in zip(tests, predictions):
                if len(rows):
                    found |= _measured(f"baseline/{name}", p, rows, predicted, data)
    return found


def _backbone(settings: Settings, data: DomainData) -> Task:
    seed_everything(settings.config.seed_everything, verbose=False)
    settings.set_domains(data.domains)
    task: Task = settings.build("model").model
    data.bind(task.backbone.input_spec)
    return task.eval()


def _features(task: Task, data: DomainData) -> list[Any]:
    """[n, d] pooled features of every row of each domain, as evaluation sees it."""
    starts = first_rows(data.prepared)
    every = [
        {i: start + np.arange(len(p.ids), dtype=np.int64)} for i, (p, start) in enumerate(zip(data.prepared, starts))
    ]
    return [seen_by(task, data, rows, partial(_pooled, task)).numpy() for rows in every]


def _pooled(task: Task, batch: Batch) -> Tensor:
    return task.model_step(batch).features


def _texts(p: Prepared) -> Any:
    """Texts of a domain; the two of a pair one after the other."""
    return np.array([" ".join(t) if isinstance(t, (tuple, list)) else str(t) for t in p.inputs], dtype=object)


def _rows(p: Prepared, split: str) -> Any:
    rows = p.rows(split)
    return rows[p.labeled[rows]]


def _labeled(parts: Sequence[tuple[Prepared, Any]], split: str) -> Labeled:
    """Inputs and targets of a split's labeled rows, domain after domain."""
    rows = [(p, values, _rows(p, split)) for p, values in parts]
    return np.concatenate([v[r] for _, v, r in rows]), np.concatenate([p.targets[r] for p, _, r in rows])


def _measured(name: str, p: Prepared, rows: Any, predicted: Any, data: DomainData) -> dict[str, float]:
    metric = primary_metric(p.domain.kind).name
    metrics = domain_metrics(p.domain, sync=False)
    targets = torch.from_numpy(p.targets[rows])
    metrics.update(torch.from_numpy(predicted), targets.long() if p.domain.kind == "multilabel" else targets)
    return {f"{name}/{display_names(data.domains)[p.domain.name]}/test/{metric}": float(metrics.compute()[metric])}


def _show(folder: RunFolder, found: dict[str, float]) -> None:
    """Write the baselines into the run's summary, and print them beside its own numbers."""
    summary = folder.write_summary(metrics=found)
    rows = []
    for key, value in sorted(found.items()):
        _, name, own = key.split("/", 2)
        mine = summary["metrics"].get(own)
        rows.append([own.split("/")[0], name, f"{value:.3f}", "—" if mine is None else f"{mine:.3f}"])
    print_table(f"{Path(folder.path)}: on its own splits", ["domain", "baseline", "value", "the run"], rows, 2)
