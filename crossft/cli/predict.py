"""``crossft predict RUN --data.inputs FILES --output out.csv``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from crossft.cli.leg import build_trainer
from crossft.cli.saved import open_run, take_option
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.runs import replacing
from crossft.tasks import Task
from crossft.types import Domain

__all__ = ["run", "table_of_predictions", "take_files"]


def run(command: str, arguments: list[str]) -> int:
    """Predict and write one table."""
    arguments, output = take_option(arguments, "output")
    if output is None or Path(output).suffix not in (".csv", ".parquet"):
        raise ConfigError(f"--output={output}: name the file to write, ending in .csv or .parquet")
    arguments, name = take_option(arguments, "domain")
    arguments, files = take_files(arguments)
    if not files:
        raise ConfigError("nothing to predict: give --data.inputs image files, folders of images, or tables")
    saved = open_run("predict", [*arguments, f"--data.inputs={json.dumps(files)}"])
    domain = _chosen(saved.task, name)
    data: DomainData = saved.settings.build("data").data
    where = data.predicted.where
    trainer = build_trainer(
        saved.settings,
        logger=False,
        callbacks=[],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
        num_nodes=1,
        strategy="auto",
    )
    batches: Any = trainer.predict(saved.task, datamodule=data)
    predictions = torch.cat([batch["predictions"].float().cpu() for batch in batches])
    table = table_of_predictions(where, predictions, domain)
    with replacing(Path(output)) as temporary:
        table.to_parquet(temporary) if output.endswith(".parquet") else table.to_csv(temporary, index=False)
    print(f"{len(table)} predictions as of {domain.role} {domain.name!r}: {output}")
    return 0


def _chosen(task: Task, name: str | None) -> Domain:
    """The domain whose head and statistics predict: the one named, else the first target, else the first.

    Raises:
        ConfigError: the run has no domain of that name.
    """
    known = {d.name: d for d in task.domains}
    if name is not None and name not in known:
        raise ConfigError(f"--domain={name} is not a domain of the run; allowed: {', '.join(known)}")
    task.default_domain = name or task.default_domain
    return known[task.default_domain]


def take_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``--data.inputs A B C`` off the arguments: every word up to the next flag is a file."""
    rest: list[str] = []
    files: list[str] = []
    taking = False
    for word in arguments:
        if word == "--data.inputs" or word.startswith("--data.inputs="):
            taking = True
            files += [word.partition("=")[2]] if "=" in word else []
        elif word.startswith("--"):
            taking = False
            rest.append(word)
        else:
            (files if taking else rest).append(word)
    return rest, files


def table_of_predictions(where: Sequence[str], predictions: Tensor, domain: Domain) -> pd.DataFrame:
    """One row an input, in order.

    Args:
        where: what each row is called.
        predictions: [n, k] probabilities, or [n] values for regression.
        domain: whose labels the columns name.
    """
    table: dict[str, Any] = {"input": list(where)}
    if domain.kind == "regression":
        return pd.DataFrame({**table, "predicted": predictions.reshape(-1).numpy()})
    if domain.kind == "multilabel":
        chosen = [[n for n, p in zip(domain.labels, row) if p >= 0.5] for row in predictions.tolist()]
        table["predicted"] = ["|".join(names) for names in chosen]
    else:
        table["predicted"] = [domain.labels[i] for i in predictions.argmax(1).tolist()]
    table |= {f"p_{name}": predictions[:, i].numpy() for i, name in enumerate(domain.labels)}
    return pd.DataFrame(table)
