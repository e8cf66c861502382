"""The adaptation experiment: every arm of every sweep is a config, and the digits are what their script says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from crossft.cli.resolve import resolve
from crossft.sweeps.arms import arguments, expand
from crossft.sweeps.file import read_sweep

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "adaptation"
SWEEPS = sorted(p for p in FOLDER.rglob("*.yaml") if not p.stem.endswith("-base"))
PAIR = ["--data.root=.", "--data.source=a", "--data.target=b"]
GRIDS = {"full/text.yaml": 20, "full/pacs.yaml": 12, "full/office.yaml": 12}


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("h5py")
    spec = importlib.util.spec_from_file_location("make_digits", FOLDER / "make_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
