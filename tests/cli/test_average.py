"""``crossft average``: the line between two legs, and soups of several runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.functional.averaging import average, interpolate
from crossft.runs import RunFolder


def test_the_ends_of_the_line_are_the_two_legs(finished: Path, tmp_path: Path, capsys) -> None:
    out, blend = tmp_path / "line.csv", tmp_path / "blend.ckpt"
    flags = ["--alpha", "0,1,0.5", "--output", str(out), "--save", str(blend)]
    assert main(["average", str(finished), *flags]) == 0
    table = pd.read_csv(out).set_index("model")
    metrics = RunFolder(finished).summary()["metrics"]
    for key in ("target/test/accuracy", "source/test/accuracy"):
        assert table.loc["alpha 1", key] == pytest.approx(metrics[key])
        assert table.loc["alpha 0", key] == pytest.approx(metrics[f"{key}/before"])
    assert "alpha 0.5" in capsys.readouterr().out
    parent = RunFolder(RunFolder(finished).summary()["parent"])
    start, end = (load_checkpoint(f.last)["state_dict"] for f in (parent, RunFolder(finished)))
    half, saved = interpolate(start, end, 0.5), load_checkpoint(blend)
    assert all(torch.equal(v, half[k]) for k, v in saved["state_dict"].items())
    assert saved["domains"] == load_checkpoint(RunFolder(finished).last)["domains"]


def test_a_soup_of_runs(finished: Path, tmp_path: Path) -> None:
    parent = RunFolder(finished).summary()["parent"]
    out, soup = tmp_path / "soup.csv", tmp_path / "soup.ckpt"
    greedy = ["--greedy", "source/val/accuracy"]
    assert main(["average", str(finished), str(parent), *greedy, "--output", str(out)]) == 0
    names = pd.read_csv(out)["model"].tolist()
    assert names[:3] == [finished.name, Path(parent).name, "uniform soup"]
    assert names[3] in ("greedy soup of 1", "greedy soup of 2")
    assert main(["average", str(finished), str(parent), "--save", str(soup), "--reestimate", "target"]) == 0
    states = [load_checkpoint(RunFolder(p).last)["state_dict"] for p in (finished, parent)]
    plain, saved = average(states), load_checkpoint(soup)["state_dict"]
    moved = {k for k, v in saved.items() if not torch.equal(v, plain[k])}
    assert moved
    assert all("running_" in k for k in moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "half"], "must be numbers"),
        (["--reestimate", "everything"], "allowed are source and target"),
    ],
)
def test_bad_flags_are_named(finished: Path, capsys, flags: list[str], message: str) -> None:
    assert main(["average", str(finished), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_started_from_none_has_no_line(finished: Path, capsys) -> None:
    parent = RunFolder(finished).summary()["parent"]
    assert main(["average", str(parent)]) == 2
    assert "started from no other run" in capsys.readouterr().err
    assert main(["average", str(finished), str(parent), "--alpha", "0.5"]) == 2
    assert "name one run" in capsys.readouterr().err
