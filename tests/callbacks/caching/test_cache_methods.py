"""Every method trains to the same weights on stored prefixes, where they are stored and where they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import adaptation_cases
import pytest
import retention_cases
from tiny import flat, image_domains
from torch import Tensor

from crossft.callbacks.caching import PrefixCache
from crossft.callbacks.freezing import Freeze
from crossft.callbacks.retention import Replay
from crossft.data import DomainData

MIXED = ("domain-mixup", "mixup")
"""Methods that make new inputs at each step, of which nothing can be stored."""


@pytest.fixture(scope="module")
def retained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retention_cases.images(tmp_path_factory.mktemp("retention"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("adaptation"), domains=("photo", "art", "sketch"), each=23)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / "cache"))


def same(run: Callable[[dict[str, Any]], Tensor], method: Callable[[], Any], last: int) -> PrefixCache:
    """Check three runs against each other; return the cache of the last, which has read what the second stored."""
    freeze = {"freeze": Freeze(train_last=last)}
    plain = run({**freeze, "method": method()})
    for _ in range(2):
        cache = PrefixCache()
        found = run({"freeze": Freeze(train_last=last), "cache": cache, "method": method()})
        assert (found - plain).abs().max() < 1e-6
    return cache


@pytest.mark.parametrize("name", retention_cases.CASES)
def test_retention(retained: Path, name: str) -> None:
    case = retention_cases.CASES[name]
    data = retention_cases.data_of(retained, target=case.target)

    def run(methods: dict[str, Any]) -> Tensor:
        return flat(retention_cases.fit(data, methods, batchnorm=case.batchnorm, dropout=0.2)[1])

    assert same(run, lambda: case.make(case.weight), 2).hits > 0


@pytest.mark.parametrize("name", adaptation_cases.CASES)
def test_adaptation(adapted: Path, name: str) -> None:
    case = adaptation_cases.CASES[name]
    data = adaptation_cases.data_of(adapted, case.sources)

    def run(methods: dict[str, Any]) -> Tensor:
        return flat(adaptation_cases.fit(data, methods, dropout=0.2)[1])

    hits = same(run, lambda: case.make(case.weight), 1).hits
    assert (hits == 0) == (name in MIXED)


def test_a_memory_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    """Rows in quarantine move the numbers of the others, and a replayed row is stored once."""
    root = image_domains(tmp_path / "images", each=23)
    for name in ("003", "017"):
        (root / "sketch" / "cat" / f"{name}.png").write_bytes(b"no image")
    data = DomainData(
        root,
        source="photo",
        target="sketch",
        train_on="target",
        augment="none",
        batch_size=16,
        on_error="quarantine",
        max_bad=0.1,
    )
    data.prepare()

    def run(methods: dict[str, Any]) -> Tensor:
        return flat(retention_cases.fit(data, methods, max_steps=8)[1])

    assert same(run, lambda: Replay(size=9, share=0.5), 1).misses == 0
