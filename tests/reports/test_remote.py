"""A W&B project read through its API. The runs are W&B's own objects, filled as its service fills them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from reports.folders import write_run
from wandb.apis.public import Run

from crossft.cli import main
from crossft.errors import RunError
from crossft.reports.records import find_runs, read_records
from crossft.reports.remote import read_project
from crossft.reports.tables import compare, text_of
from crossft.runs import RunFolder


class Api:
    """Answers ``runs`` as ``wandb.Api`` does, without a service."""

    def __init__(self, runs: list[Run]) -> None:
        self.found, self.asked = runs, ""

    def runs(
        self,
        path: str | None = None,
        filters: dict[str, Any] | None = None,
        order: str = "+created_at",
        per_page: int = 50,
        include_sweeps: bool = False,
        lazy: bool = True,
    ) -> list[Run]:
        self.asked = str(path)
        assert not lazy, "a lazy run asks the service again for each config"
        return self.found


def test_the_stand_in_takes_what_wandb_takes() -> None:
    ours, theirs = inspect.signature(Api.runs), inspect.signature(wandb.Api.runs)
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def remote(
    arm: str, seed: int, metrics: dict[str, Any], told: dict[str, Any] | None = None, name: str = "", **config: Any
) -> Run:
    """A run as the service sends it: config and summary are JSON texts, each config value in a ``value``.

    ``told`` is what crossft writes when a run ends; without it the run crashed.
    """
    data = {"source": "photo", "target": "sketch", "eval": None, "shots": 10}
    ours = {"experiment": "pacs", "arm": arm, "seed_everything": seed, "init": None, "select": None, "data": data}
    summary = {
        **metrics,
        **({"crossft": told} if told else {}),
        "train/loss": 0.5,
        "_runtime": 12.5,
        "_step": 7,
        "_wandb": {"runtime": 12},
    }
    attributes = {
        "id": f"UnVuOnYx{arm}{seed}", "name": f"{arm}{seed}", "displayName": name,
        "state": "finished" if told else "crashed",
        "config": json.dumps({key: {"value": value} for key, value in {"_wandb": {}, **ours, **config}.items()}),
        "summaryMetrics": json.dumps(summary), "systemMetrics": "{}", "tags": [], "group": arm, "jobType": None,
        "createdAt": f"2026-11-24T10:00:0{seed}Z", "projectId": 1, "historyKeys": {}, "user": {"username": "us"},
    }  # fmt: skip
    service = SimpleNamespace(app_url="https://wandb.ai/")
    return Run(service, "us", "pacs", f"{arm}{seed}", attributes, lazy=False)  # type: ignore[arg-type]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Run folders: two arms that start from one source leg, and a failed run."""
    leg = write_run(tmp_path / "pacs", "source", 0, None, domains={"source": ["photo"]})
    for arm, target in (("base", 0.7), ("better", 0.8)):
        for seed in range(3):
            write_run(tmp_path / "pacs", arm, seed, target + seed / 100, 0.9, parent=str(leg.path))
    write_run(tmp_path / "pacs", "better", 3, None, None, status="failed", error="TrainingError: training diverged")
    return tmp_path


@pytest.fixture
def api(local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The same runs in a project, and one that crashed and a stranger beside them."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path_factory.mktemp("wandb")))
    runs = []
    for path in find_runs([local]):
        told = RunFolder(path).summary()
        metrics = {key: value for key, value in told.pop("metrics").items() if value is not None}
        data = {"data": {"source": "photo", "target": None}} if told["arm"] == "source" else {}
        runs.append(remote(told["arm"], told["seed"], metrics, told, path.name, **data))
    runs.append(remote("better", 4, {"target/test/accuracy": "NaN"}, name="better-s4-abcdef12"))
    runs.append(remote("better", 5, {"target/val/accuracy": 0.1}, {"status": "pruned", "error": "ended early"}))
    stranger = remote("x", 0, {}, {})
    stranger.config.clear()
    found = Api([*runs, stranger])
    monkeypatch.setattr(wandb, "Api", lambda: found)
    return found


def test_a_project_reads_like_the_folders_of_its_runs(local: Path, api: Api) -> None:
    folders, project = read_records([local]), read_records(["wandb:us/pacs"])
    assert api.asked == "us/pacs"
    assert len(project) == len(folders) + 2
    columns = [c for c in folders.columns if c not in ("path", "written")]
    assert set(columns) <= set(project.columns)
    for (_, mine), (_, theirs) in zip(project.iterrows(), folders.iterrows(), strict=False):
        for column in columns:
            same = mine[column] == theirs[column] or (pd.isna(mine[column]) and pd.isna(theirs[column]))
            assert same, (column, mine[column], theirs[column])
    crashed, pruned = project.iloc[-2], project.iloc[-1]
    assert (pruned["status"], pruned["error"]) == ("pruned", "ended early")
    assert (crashed["arm"], crashed["seed"], crashed["status"], crashed["seconds"]) == ("better", 4, "failed", 12.5)
    assert "W&B says crashed; see https://wandb.ai/us/pacs/runs/better4" in crashed["error"]
    assert np.isnan(crashed["target/test/accuracy"])
    mine_table, theirs_table = compare(project, "base")[0], compare(folders, "base")[0]
    assert text_of([mine_table], "csv") == text_of([theirs_table], "csv")
    assert mine_table.runs["better"] == "3, 2 failed, 1 pruned"


def test_folders_and_projects_together(local: Path, api: Api) -> None:
    assert len(read_records([local, "wandb:us/pacs"])) == 8 + 10


def test_compare_and_page_from_a_project(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", "wandb:us/pacs", "--baseline=base", f"--output={page}"]) == 0
    assert "(baseline)" in capsys.readouterr().out
    assert 'href="https://wandb.ai/us/pacs/runs/base0"' in page.read_text()


def test_what_cannot_be_read_says_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pacs", "us/", "us/pacs/runs"):
        with pytest.raises(RunError, match=r"must name a W&B project, as in wandb:ENTITY/PROJECT"):
            read_project(name)
    api.found = api.found[-1:]
    with pytest.raises(RunError, match="has 1 runs, and none that crossft fit logged"):
        read_project("us/pacs")

    def refuse(*_: Any, **__: Any) -> list[Run]:
        raise ValueError("Could not find project <Project us/pacs>")

    monkeypatch.setattr(api, "runs", refuse)
    with pytest.raises(RunError, match=r"cannot be read \(Could not find project .* log in with `wandb login`"):
        read_project("us/pacs")
