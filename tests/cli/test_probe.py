"""A linear probe of the target that several arms start from: trained once, on the rows that have labels in the runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli.legs import source_settings
from crossft.cli.parser import Settings
from crossft.cli.source_leg import take_source_leg
from crossft.data import DomainData
from crossft.errors import ConfigError
from crossft.runs import RunFolder

Fit = Callable[..., int]
FREEZE = "crossft.callbacks.freezing.Freeze"
GRADUAL = "crossft.callbacks.freezing.GradualUnfreezing"
PLAIN = ["--methods.l2sp=null", "--methods.freeze=null", "--data.shots=3"]
PROBE = ["--source_leg.data.train_on=target", f"--source_leg.methods.freeze={FREEZE}",
         "--source_leg.methods.freeze.train_last=0", "--source_leg.trainer.max_epochs=2",
         "--source_leg.model.init_args.layer_decay=1.0"]  # fmt: skip


@pytest.fixture(scope="module")
def shared(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms that go on from a probe in different ways; the last has no source domain."""
    root = tmp_path_factory.mktemp("probed")
    assert fit(root, *PLAIN, *PROBE, "--arm=plain") == 0
    assert fit(root, *PLAIN, *PROBE, "--arm=decay", "--model.layer_decay=0.5") == 0
    assert fit(root, *PLAIN, *PROBE, "--arm=alone", "--data.source=null") == 0
    return root / "tiny"


def one(shared: Path, name: str) -> RunFolder:
    (path,) = shared.glob(f"{name}-*")
    return RunFolder(path)


def test_one_probe_is_trained_for_all_arms(shared: Path) -> None:
    probe = one(shared, "source")
    arms = [one(shared, name) for name in ("plain", "decay", "alone")]
    assert {arm.summary()["parent"] for arm in arms} == {str(probe.path)}
    assert probe.summary()["domains"] == {"target": ["sketch"]}
    assert arms[0].summary()["domains"] == {"source": ["photo"], "target": ["sketch"]}


def test_the_probe_has_the_rows_and_labels_of_the_run(shared: Path) -> None:
    probe, arm = one(shared, "source"), one(shared, "plain")
    splits = json.loads(arm.splits.read_text())
    assert json.loads(probe.splits.read_text()) == {"sketch": splits["sketch"]}
    known = []
    for folder in (probe, arm):
        config = yaml.safe_load(folder.config.read_text())
        data: DomainData = Settings(config).build("data").data
        data.prepare()
        target = data.prepared[-1]
        rows = target.rows("train")
        known.append(target.ids[rows[target.labeled[rows]]].tolist())
    assert known[0] == known[1]
    assert len(known[0]) == 2 * 3


def test_head_and_metrics_carry_over(shared: Path) -> None:
    probe, arm = one(shared, "source"), one(shared, "plain")
    before = json.loads(arm.before.read_text())
    assert before["untrained"] == []
    key = "target/test/accuracy"
    assert before["metrics"][key] == probe.summary()["metrics"][key]


def test_the_probe_is_the_first_phase_of_lp_ft_to_the_bit(shared: Path, fit: Fit, tmp_path: Path) -> None:
    phases = [f"--methods.lp={GRADUAL}", '--methods.lp.phases=[{"train_last": 0, "epochs": 2}, {}]']
    run = ["--source_leg=null", "--data.source=null", "--trainer.max_epochs=3", "--checkpoints.keep=9"]
    assert fit(tmp_path, *PLAIN, *phases, *run, f"--run.dir={tmp_path}/run") == 0
    probe = load_checkpoint(one(shared, "source").last)
    saved = [load_checkpoint(p) for p in (tmp_path / "run" / "checkpoints").glob("*.ckpt")]
    (phase,) = {c["global_step"]: c for c in saved if c["global_step"] == probe["global_step"]}.values()
    assert all(torch.equal(value, phase["state_dict"][key]) for key, value in probe["state_dict"].items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--source_leg.data.source=sketch"], "'sketch' is a data.target of the run"),
        ([*PROBE, "--source_leg.data.shots=5"], "source_leg.data.shots=5: with "),
        ([*PROBE, "--source_leg.data.split_seed=1"], "source_leg.data.split_seed=1"),
        ([*PROBE, "--source_leg.data.source=cartoon"], "source_leg.data.source=cartoon: "),
        (["--source_leg.data.train_on=[source, target]"], "must be source or target"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_labels_that_the_run_does_not_have_are_refused(config: Path, flags: list[str], said: str) -> None:
    base = [f"--config={config}", "--data.root=.", "--data.source=photo", "--data.target=sketch", *PLAIN]
    with pytest.raises(ConfigError) as caught:
        source_settings(Settings([*base, *flags]))
    assert said in str(caught.value)


def test_a_sequence_starts_from_its_first_domain(config: Path) -> None:
    words = [f"--config={config}", "--data.root=.", "--sequence=photo,sketch", "--source_leg.data.train_on=target"]
    with pytest.raises(ConfigError, match="a sequence starts from its first domain"):
        source_settings(Settings(words))


def test_a_probe_of_the_source_is_a_method_of_its_leg(config: Path) -> None:
    base = [f"--config={config}", "--data.root=.", "--data.source=photo", "--data.target=sketch", *PLAIN]
    source = source_settings(Settings([*base, *PROBE[1:3]]))
    assert source.config.data.target is None
    assert source.config.methods["freeze"].init_args.train_last == 0


def test_flags_of_the_leg_add_up() -> None:
    words = ["--a=1", "--source_leg.x.y=3e-4", "--source_leg.x.z", "[1]", "--source_leg=null", "--source_leg.m=C",
             "--source_leg.m.k.j=text", "--source_leg.m.n=null"]  # fmt: skip
    rest, found = take_source_leg(words)
    assert rest == ["--a=1", "--source_leg=null"]
    assert found == {"x": {"y": 3e-4, "z": [1]}, "m": {"class_path": "C", "init_args": {"k": {"j": "text"}, "n": None}}}
