"""What a plan finds out before the first run, from configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps.sweeping import write_sweep
from tiny import image_domains, text_domains

from crossft.cli.dry_run import DryRun
from crossft.cli.resolve import resolve
from crossft.errors import ConfigError
from crossft.sweeps.file import read_sweep
from crossft.sweeps.plan import refuse_metric

BACKBONE = "model.backbone"
FREEZE = "crossft.callbacks.freezing.Freeze"
GRADUAL = "crossft.callbacks.freezing.GradualUnfreezing"
EPOCHS = [f"--methods.g={GRADUAL}", '--methods.g.every={"epochs": 1}']
PHASES = [f"--methods.g={GRADUAL}", '--methods.g.every={"patience": 1}']
CONFIG = {
    "model": {
        "class_path": "crossft.tasks.Classification",
        "init_args": {
            "backbone": {"class_path": "crossft.backbones.Timm", "init_args": {"name": "test_resnet", "weights": None}},
        },
    },
    "data": {"source": "photo", "target": "sketch"},
    "trainer": {"accelerator": "cpu", "devices": 1},
    "wandb": {"mode": "disabled"},
    "source_leg": {"trainer": {"max_epochs": 1}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dry")
    image_domains(folder / "data", each=2)
    text_domains(folder / "texts")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return [f"--config={folder / 'config.yaml'}", f"--data.root={folder / 'data'}"]


@pytest.fixture(scope="module")
def dry_run() -> DryRun:
    return DryRun()


def texts(base: list[str]) -> list[str]:
    root = Path(base[1].partition("=")[2]).with_name("texts")
    named = ["--data.source=books", "--data.target=kitchen", f"--{BACKBONE}=crossft.backbones.Transformer"]
    return [*base, f"--data.root={root}", *named, f"--{BACKBONE}.name=packaged:minilm", f"--{BACKBONE}.weights=null"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([f"--{BACKBONE}.name=test_resnett"], "'test_resnett' is no timm model, nearest: test_resnet"),
        ([f"--{BACKBONE}.name=packaged:nonsense"], "packaged vision weights: packaged:efficientnet_lite0"),
        ([f"--{BACKBONE}.name=./nowhere"], "timm cannot build name='./nowhere'"),
        ([f"--{BACKBONE}.name=test_mambaout", f"--{BACKBONE}.weights=no.pth"], "weights='no.pth' is no file"),
        (["--source_leg.model.init_args.backbone.init_args.name=nonsense_net"], "in the source leg: name='nonsense"),
        (["--trainer.strategy=fsdp"], "trainer.strategy=FSDPStrategy: the command line loads"),
        (
            ['--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'],
            "trainer.strategy=ModelParallelStrategy: the command line loads",
        ),
        (["--trainer.strategy=nonsense"], "trainer: You selected an invalid strategy name: `strategy='nonsense'`"),
        (["--select.metric=target/val/nonsense"], "allowed: source/val/loss, source/val/accuracy"),
        (["--select.metric=target/val/loss", "--data.shots=2"], "A target without validation labels cannot choose"),
        ([*PHASES, "--methods.g.monitor=target/val/nonsense"], "GradualUnfreezing.monitor='target/val/nonsense'"),
        (["--data.target=nowhere"], "data.target: no domain 'nowhere' under"),
        (["--data.source=nowhere"], "data.source: no domain 'nowhere' under"),
        ([f"--methods.freeze={FREEZE}", "--methods.freeze.train_last=99"], "methods.freeze: "),
        ([f"--methods.freeze={FREEZE}", "--methods.freeze.train=[layer9]"], "unknown stage"),
        ([*PHASES, "--methods.g.monitor=target/val/loss", "--methods.g.first=9"], "methods.g: first=9 must be"),
        (["--methods.d=crossft.callbacks.adaptation.DANN", "--methods.d.layer=nowhere"], "methods.d: layer 'nowhere'"),
        ([*EPOCHS, "--trainer.max_epochs=9", f"--methods.f={FREEZE}", "--methods.f.train_last=1"], "methods.f and "),
        ([*EPOCHS, "--methods.g.by=2", "--trainer.max_epochs=3"], "those before it take 3 epochs, and trainer.max_ep"),
        ([f"--methods.g={GRADUAL}", '--methods.g.every={"steps": 9}', "--trainer.max_steps=45"], "45 steps, and trai"),
    ],
    ids=lambda value: value[-1].partition("=")[2] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_would_fail_is_refused(base: list[str], dry_run: DryRun, flags: list[str], said: str) -> None:
    assert said in resolve([*base, *flags], [], dry_run)["error"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([f"--{BACKBONE}.name=./nowhere"], "transformers cannot read the config of name='./nowhere'"),
        ([f"--{BACKBONE}.name=packaged:nonsense"], "packaged text weights: packaged:minilm"),
        (["--data.shots=1000"], "data.shots=1000 asks for more labels than"),
        (["--data.label_column=nothing"], "no column 'nothing' (data.label_column)"),
    ],
)
def test_tables_of_text_are_read_and_split(base: list[str], dry_run: DryRun, flags: list[str], said: str) -> None:
    assert said in resolve([*texts(base), *flags], [], dry_run)["error"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--select.metric=target/val/infomax", "--data.shots=2"],
        [*EPOCHS, "--trainer.max_epochs=9"],
        ["--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=a/val/b",
         "--trainer.callbacks.strict=false"],
        ["--trainer.strategy=ddp", "--trainer.devices=2"],
        ["--trainer.accelerator=gpu", "--trainer.devices=[0,1]", "--trainer.precision=16-mixed"],
        ["--sequence=photo,sketch", "--data.source=null", "--data.target=null", "--select.metric=target/val/loss"],
        [f"--{BACKBONE}.name=hf-hub:owner/not-in-the-cache", f"--{BACKBONE}.weights=auto"],
        ["--data.root=/of/another/machine", "--data.target=unseen", "--select.metric=target/val/accuracy"],
        [f"--methods.g={GRADUAL}", '--methods.g.every={"patience": 1}', "--methods.g.monitor=gap/val/mmd",
         "--methods.gap=crossft.callbacks.freezing.DomainGap"],
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_what_cannot_be_known_or_is_right_passes(base: list[str], dry_run: DryRun, flags: list[str]) -> None:
    assert "error" not in resolve([*base, *flags], [], dry_run)


def test_one_model_is_built_once_for_all_arms(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    dry_run = DryRun()
    from crossft.cli import dry_run as module

    build = module._built
    monkeypatch.setattr(module, "_built", lambda settings: built.append(1) or build(settings))
    for rate in (0.1, 0.2, 0.3):
        optimizer = ["--model.optimizer=torch.optim.SGD", f"--model.optimizer.lr={rate}"]
        assert "error" not in resolve([*base, *optimizer], [], dry_run)
    assert len(built) == 2, "one for the runs and one for their source leg, which has no target"


def test_nothing_is_loaded_or_drawn(base: list[str], dry_run: DryRun) -> None:
    import torch

    state = torch.random.get_rng_state()
    pretrained = [f"--{BACKBONE}.name=packaged:efficientnet_lite0", f"--{BACKBONE}.weights=auto"]
    found = resolve([*base, *pretrained], [], dry_run)
    assert "error" not in found
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_sweeps_metric_must_be_one_that_a_run_measures(base: list[str], dry_run: DryRun, tmp_path: Path) -> None:
    found = [resolve(base, [], dry_run)]
    for name in ("target/test/accuracy", "source/val/loss", "source/retention"):
        refuse_metric(read_sweep(write_sweep(tmp_path, metric={"name": name})), found)
    sweep = read_sweep(write_sweep(tmp_path, metric={"name": "target/test/acuracy", "goal": "maximize"}))
    with pytest.raises(ConfigError, match="acuracy' is measured by no arm; allowed: source/test/loss"):
        refuse_metric(sweep, found)
    refuse_metric(sweep, [{**found[0], "metrics": None}])
