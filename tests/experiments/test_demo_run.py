from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crossft.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments" / "demo")
        patch.chdir(ROOT)
        import run

        yield run
        del sys.modules["run"]


def test_every_arm_is_a_valid_command_and_labeled_arms_share_their_source(demo: ModuleType, tmp_path: Path) -> None:
    from crossft.cli.legs import source_settings
    from crossft.cli.parser import Settings

    parsed = {arm: Settings(demo.command(arm, 1, tmp_path, tmp_path / "data")[1:]) for arm in demo.ARMS}
    assert {arm: list(s.config.methods) for arm, s in parsed.items()} == {
        "probe": ["freeze"],
        "source-only": [],
        "dann": ["dann"],
        "full": [],
        "full-bn-training": [],
        "l2sp": ["l2sp"],
    }
    policies = {arm: s.config.model.init_args.batchnorm for arm, s in parsed.items()}
    assert [arm for arm, policy in policies.items() if policy != "frozen"] == ["full-bn-training"]
    sources: list[dict[str, Any]] = [source_settings(s).plain() for s in parsed.values() if s.config.source_leg]
    assert len(sources) == 4
    assert all(source == sources[0] for source in sources)
    assert sources[0]["model"]["init_args"]["batchnorm"] == "frozen"
    assert {s.config.data.target_labels for arm, s in parsed.items() if arm in ("dann", "source-only")} == {"none"}


def test_report_writes_table_picture_and_page(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, arm in enumerate(demo.ARMS):
        for seed in range(2):
            target, source = 0.5 + 0.05 * i + 0.01 * seed, 0.9 - 0.1 * i
            metrics: dict[str, float | None] = {"target/test/accuracy": target, "source/test/accuracy": source}
            known = "--config=configs/vision/domains.yaml" in demo.ARMS[arm]
            metrics |= {f"{k}/before": (0.4 if k[0] == "t" else 0.8) if known else None for k in dict(metrics)}
            metrics |= {
                "target/gain": target - 0.4 if known else None,
                "source/retention": source / 0.8 if known else None,
            }
            RunFolder.create(
                tmp_path / f"{arm}-s{seed}", experiment="demo", arm=arm, seed=seed, status="finished", seconds=1.0,
                metrics=metrics, domains={"source": ["digits"], "target": ["blended"]},
                primary={"source": "accuracy", "target": "accuracy"},
            )  # fmt: skip
    demo.report(tmp_path)
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in (*demo.ARMS, "before"))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    before = [r for r in rows if r["arm"] == "before"]
    assert len(rows) == 2 * (len(demo.ARMS) + 1)
    assert [float(r["target/test/accuracy"]) for r in before] == [0.4, 0.4]
    assert [float(r["source/retention"]) for r in before] == [1.0, 1.0]
    dann = next(r for r in rows if r["arm"] == "dann" and r["seed"] == "0")
    assert float(dann["target/gain"]) == pytest.approx(0.05)  # against source-only: it has no "before" of its own
    assert float(dann["source/retention"]) == pytest.approx(0.7 / 0.8, abs=1e-4)
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    assert "dann" in (tmp_path / "index.html").read_text()
