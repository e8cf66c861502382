"""The adaptation experiment: every arm of every sweep is a config, and the digits are what their script says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from reports.folders import write_run

from crossft.cli.resolve import resolve
from crossft.runs import write_json
from crossft.sweeps.arms import arguments, expand
from crossft.sweeps.file import read_sweep

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "adaptation"
SWEEPS = sorted(p for p in FOLDER.rglob("*.yaml") if not p.stem.endswith("-base"))
PAIR = ["--data.root=.", "--data.source=a", "--data.target=b"]
GRIDS = {"full/text.yaml": 20, "full/pacs.yaml": 12, "full/office.yaml": 12}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("h5py")
    return script("make_digits")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: str(p.relative_to(FOLDER)))
def test_every_arm_is_a_config(path: Path) -> None:
    name = str(path.relative_to(FOLDER))
    sweep = read_sweep(path, PAIR[:1] if name in GRIDS else PAIR)
    arms = expand(sweep)
    if name in GRIDS:
        assert len({(a.overrides["data.source"], a.overrides["data.target"]) for a in arms}) == GRIDS[name]
    assert len(sweep.seeds) >= 3 or "pilot" in name
    seen = set()
    for arm in {a.name: a for a in arms}.values():
        found = resolve([f"--config={sweep.config}", *arguments(arm.overrides)], [])
        assert "error" not in found, (arm.label, found)
        seen.add(found["hash"])
    assert len(seen) == len({a.name for a in arms}) > 2
    assert f"crossft sweep run experiments/adaptation/{name} " in path.read_text()
    assert "NOT RUN" in path.read_text() or not name.startswith("full/")


def test_tables_keep_apart_what_has_learned_from_other_labels(tmp_path: Path) -> None:
    collect = script("collect")
    frozen, tfidf = ("baseline/frozen/target/test/accuracy", "baseline/tfidf/target/test/accuracy")
    for arm, accuracy, baseline in (("source-only", 0.5, 0.6), ("target-supervised", 0.9, 0.8), ("dann", 0.55, 0.6)):
        for seed in range(3):
            metrics = {"target/test/accuracy": accuracy + seed / 100, tfidf: baseline, "oracle/target/regret": 0.01}
            metrics |= {f"oracle/target/regret/{name}": 0.02 for name in collect.SCORES[1:]}
            metrics |= {"oracle/target/test/accuracy": accuracy + 0.1, frozen: baseline - 0.1}
            selected = "target/val/accuracy" if arm == "target-supervised" else "target/val/infomax"
            run = write_run(tmp_path / "adaptation-x", arm, seed, metrics=metrics, selected_by=selected)
            write_json(run.splits, {"photo": {"test": [seed]}, "sketch": {"test": [1, 2]}})
    rows = collect.results([str(tmp_path)])
    lines = collect.table(rows).splitlines()
    assert lines[2].startswith("| source-only | 3 | 51.0 ± 2.5 |")
    assert lines[4].startswith("| dann | 3 | 56.0 ± 2.5 | +5.0 ± 0.0 |")
    assert lines[5:] == [
        "| TF-IDF + logistic regression, source labels | | 60.0 | | | |",
        "| frozen features + logistic regression, source labels | | 50.0 | | | |",
        "| TF-IDF + logistic regression, target labels | | 80.0 | | | |",
        "| frozen features + logistic regression, target labels | | 70.0 | | | |",
    ]
    scores = collect.selectors(rows).splitlines()
    assert scores[0] == "| chosen by | mean regret over 3 runs |"
    assert scores[2:4] == ["| target/val/infomax | 1.0 |", "| source/val/accuracy | 2.0 |"]
    write_json(run.splits, {"photo": {"test": [0]}, "sketch": {"test": [1, 3]}})
    with pytest.raises(SystemExit, match="not all runs were tested on the same rows"):
        collect.results([str(tmp_path)])


def test_a_blend_is_the_difference_to_a_patch(digits: ModuleType) -> None:
    scene = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    digit = np.array([[0, 200], [255, 10]], np.uint8)
    found = digits.blend(digit, [scene], np.random.default_rng(0)).astype(int)
    patches = [scene[i : i + 2, j : j + 2].astype(int) for i in range(4) for j in range(5)]
    assert any((found == np.abs(p - digit[:, :, None].astype(int))).all() for p in patches)


def test_domains_share_no_digit_and_are_written_twice_alike(digits: ModuleType, tmp_path: Path) -> None:
    import h5py

    rng = np.random.default_rng(0)
    y = np.arange(200) % 10
    x = rng.integers(0, 255, (200, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "m.npz", x_train=x, y_train=y, x_test=x[::-1], y_test=y[::-1])
    with h5py.File(tmp_path / "u.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/data"], file[f"{split}/target"] = rng.random((50, 256)), np.arange(50) % 10
    for name in ("one", "two"):
        digits.make_digits(tmp_path / name, tmp_path / "m.npz", tmp_path / "u.h5", train=40, test=20)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    count = {d: sum(p.parts[:2] == (d, "train") for p in files) for d in ("mnist", "blended", "usps")}
    assert count == {"mnist": 40, "blended": 40, "usps": 40}  # 36 of USPS, four of each of ten classes
    assert all((tmp_path / "one" / p).read_bytes() == (tmp_path / "two" / p).read_bytes() for p in files)
    rows = {d: {p.name for p in files if p.parts[:2] == (d, "train")} for d in ("mnist", "blended")}
    assert not rows["mnist"] & rows["blended"]
    plain = np.asarray(Image.open(tmp_path / "one" / next(p for p in files if p.parts[0] == "mnist")))
    assert (plain[..., 0] == plain[..., 1]).all()
