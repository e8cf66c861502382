from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).resolve().parents[2] / "experiments" / "demo" / "make_data.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.make_data(tmp_path_factory.mktemp("demo") / "data", images=100, seed=3)


def pictures(root: Path, domain: str) -> dict[str, np.ndarray]:
    return {str(f.relative_to(root / domain)): np.asarray(Image.open(f)) for f in (root / domain).glob("*/*.png")}


def test_domains_are_balanced_and_repeat(maker: ModuleType, root: Path, tmp_path: Path) -> None:
    again = maker.make_data(tmp_path, images=100, seed=3)
    for domain, channels in zip(maker.DOMAINS, [(), (), (3,)], strict=True):
        images = pictures(root, domain)
        assert Counter(name.split("/")[0] for name in images) == {str(c): 10 for c in range(10)}
        assert {i.shape for i in images.values()} == {(40, 40, *channels)}
        assert len({i.tobytes() for i in images.values()}) == 100
        assert all(np.array_equal(i, pictures(again, domain)[name]) for name, i in list(images.items())[:5])
    other = pictures(maker.make_data(tmp_path / "other", images=10, seed=4), "printed")
    assert not np.array_equal(other["3/0000.png"], pictures(root, "printed")["3/0000.png"])


def test_blended_shares_no_handwriting_with_digits(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = type("Scenes", (), {"images": [np.zeros((60, 60, 3)), np.zeros((60, 60, 3))]})
    monkeypatch.setattr(maker, "load_sample_images", lambda: scenes)  # on black patches |patch - digit| is the digit
    maker.make_data(tmp_path, images=100)
    digits = {i.tobytes() for i in pictures(tmp_path, "digits").values()}
    blended = {i[:, :, 0].tobytes() for i in pictures(tmp_path, "blended").values()}
    assert len(digits) == len(blended) == 100
    assert not digits & blended


@pytest.mark.parametrize("images", [0, 55, 880])
def test_impossible_sizes_are_refused(maker: ModuleType, tmp_path: Path, images: int) -> None:
    with pytest.raises(ValueError, match=f"images is {images}"):
        maker.make_data(tmp_path, images=images)
