"""Fixtures of this folder: small data sets, and a cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from backbones.tiny_models import tiny_text
from tiny import image_domains, text_domains


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of 22 images: 15 train, 2 validate, 5 test."""
    return image_domains(tmp_path_factory.mktemp("images") / "data", each=11)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of 22 texts under ``data``, and a tiny BERT under ``model``."""
    folder = tmp_path_factory.mktemp("texts")
    text_domains(folder / "data", each=11)
    tiny_text("bert", folder / "model")
    return folder


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stored prefixes."""
    monkeypatch.setenv("CROSSFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"
