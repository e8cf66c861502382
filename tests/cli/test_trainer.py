"""The Trainer of the command line: what it leaves out, and what it refuses."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.profilers import SimpleProfiler

from crossft.cli.leg import build_trainer
from crossft.cli.parser import Settings
from crossft.cli.profiling import NoProfiler


def test_nothing_is_measured_unless_a_profiler_is_named(config: Path) -> None:
    words = [f"--config={config}", "--data.root=.", "--data.source=photo", "--data.target=sketch"]
    plain, named = (Settings([*words, *more]) for more in ([], ["--trainer.profiler=simple"]))
    profiler = build_trainer(plain, logger=False).profiler
    assert type(profiler) is NoProfiler
    with profiler.profile("a hook") as entered:
        assert entered is None
    assert profiler.profile("one") is profiler.profile("other")
    assert isinstance(build_trainer(named, logger=False).profiler, SimpleProfiler)
