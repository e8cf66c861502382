"""Fixtures of the whole suite: no network, no GPU, one thread, a private cache, and the shared data where it exists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # read by torch when it is first imported, here and in every process a test starts
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this session alone, so that no test reads what an earlier session left."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSFT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data sets: ``CROSSFT_DATA``, else ``../shared/data`` beside the repository; skipped where absent."""
    folder = Path(os.environ.get("CROSSFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no shared data at {folder}; set CROSSFT_DATA to the folder that holds pacs-96, amazon4-airline, ..."
        )
    return folder
