"""Every wrong setting is named, with what is allowed, before anything trains; never a traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from crossft.cli import main
from crossft.cli.parser import Settings
from crossft.runs import RunFolder

L2SP = "crossft.callbacks.retention.L2SP"

CASES: dict[str, tuple[list[str], int, str]] = {
    "unknown method null": (["--methods.ewc=null"], 2, "methods.ewc=null.*freeze, l2sp"),
    "null of a name only flags mention": (["--methods.x.weight=1", "--methods.x=null"], 2, "weight"),
    "negative weight": (["--methods.l2sp.weight=-1"], 2, "weight=-1.0 must be >= 0"),
    "method argument misspelled": (["--methods.l2sp.wieght=1"], 2, "wieght"),
    "method is no callback": (["--methods.x=torch.nn.Linear"], 2, "not correspond to a subclass of Callback"),
    "unknown class": (["--methods.x=crossft.callbacks.retention.Nope"], 2, "Nope"),
    "unknown module": (["--methods.x=crossft.nope.Nope"], 2, "crossft.nope"),
    "unknown key": (["--data.sourze=photo"], 2, "data.sourze"),
    "wrong type": (["--data.shots=many"], 2, "data.shots=many.*int"),
    "unknown domain": (["--data.target=skecth"], 2, "no domain 'skecth'.*cartoon, photo, sketch"),
    "source is target": (["--data.target=photo"], 2, "'photo' is named twice"),
    "no batch": (["--data.batch_size=0"], 2, "data.batch_size=0 must be at least 1"),
    "missing root": (["--data.root=/nonexistent"], 1, "/nonexistent"),
    "too many shots": (["--data.shots=1000"], 2, "data.shots=1000"),
    "shots and fraction": (["--data.shots=1", "--data.fraction=0.5"], 2, "two label budgets"),
    "unknown stage": (["--methods.freeze=null", "--methods.f=crossft.callbacks.freezing.Freeze",
                       "--methods.f.train=[blocks.9]"], 1, "unknown stage 'blocks.9'.*layer4"),
    "freezes more than there is": (["--methods.freeze.train_last=9"], 2, "train_last=9"),
    "freezes by nothing": (["--methods.f=crossft.callbacks.freezing.Freeze"], 2, "without a criterion"),
    "unknown backbone": (["--model.backbone.name=resnet99"], 1, "resnet99"),
    "label smoothing": (["--model.label_smoothing=1.5"], 2, r"label_smoothing=1.5 must be in \[0, 1\)"),
    "layer decay": (["--model.layer_decay=0"], 2, r"layer_decay=0.0 must be in \(0, 1\]"),
    "regression on classes": (["--model=crossft.tasks.Regression"], 2, "crossft.tasks.Classification"),
    "batchnorm policy": (["--model.batchnorm=melted"], 2, "melted"),
    "accelerator": (["--trainer.accelerator=abacus"], 2, "abacus"),
    "precision": (["--trainer.precision=17"], 2, "17"),
    "fast_dev_run": (["--trainer.fast_dev_run=true"], 2, "max_steps"),
    "init is missing": (["--init=/nonexistent/run"], 1, "/nonexistent/run does not exist"),
    "select is not measured": (["--select=target/val/acuracy"], 2, "target/val/accuracy"),
    "select without labels": (["--data.shots=2", "--select=target/val/accuracy"], 2, "validation_from_labels"),
    "checkpoints": (["--checkpoints.keep=0"], 2, "keep=0"),
    "source leg misspelled": (["--source_leg={trainer: {max_epoch: 3}}"], 2, "max_epoch"),
    "wandb mode": (["--wandb.mode=on"], 2, "wandb.mode: .*auto.*offline"),
    "allow nothing": (["--allow"], 2, "--allow"),
    "missing config": (["--config=/nonexistent.yaml"], 2, "/nonexistent.yaml"),
    "optimizer argument": (["--model.optimizer.lrr=1"], 2, "lrr"),
    "learning rate": (["--model.optimizer.lr=-1"], 2, "model.optimizer=torch.optim.AdamW.*learning rate.*lr=-1"),
    "betas": (["--model.optimizer.betas=[2,3]"], 2, "model.optimizer=.*beta.*betas="),
    "optimizer with a closure": (["--model.optimizer=torch.optim.LBFGS"], 2, "LBFGS.*torch.optim.AdamW"),
    "optimizer of sparse gradients": (["--model.optimizer=torch.optim.SparseAdam"], 2, "SparseAdam.*dense"),
    "synchronized batchnorm": (["--trainer.sync_batchnorm=true"], 2, "sync_batchnorm=true: torch's conversion"),
    "head dropout": (["--model.head_dropout=2"], 2, r"model.head_dropout=2.0 must be in \[0, 1\)"),
    "no image": (["--model.backbone.image_size=0"], 2, "image_size=0 must be at least 1"),
    "negative image": (["--model.backbone.image_size=-5"], 2, "image_size=-5 must be at least 1"),
    "no accumulation": (["--trainer.accumulate_grad_batches=0"], 2, "accumulate_grad_batches=0 must be at least 1"),
    "validation never": (["--trainer.check_val_every_n_epoch=0"], 2, "check_val_every_n_epoch=0 must be at least 1"),
    "validation beyond the epoch": (["--trainer.val_check_interval=1000"], 2, "val_check_interval=1000 is more than"),
    "negative seed": (["--seed_everything=-1"], 2, "seed_everything=-1 must be .* 4294967295"),
    "large seed": (["--seed_everything=4294967296"], 2, "seed_everything=4294967296 must be"),
    "no epochs": (["--trainer.max_epochs=0"], 2, "trainer.max_epochs=0 trains nothing"),
    "no steps": (["--trainer.max_steps=0"], 2, "trainer.max_steps=0 trains nothing"),
    "no end": (["--trainer.max_epochs=-1", "--trainer.max_steps=-1"], 2, "max_epochs=-1 .* never ends"),
    "no training batches": (["--trainer.limit_train_batches=0"], 2, "limit_train_batches=0 would end epochs early"),
    "some training batches": (["--trainer.limit_train_batches=7"], 2,
                              r"limit_train_batches=7 .*leave it out \(1.0\).*data.limit.*trainer.max_steps"),
    "one training batch": (["--trainer.limit_train_batches=1"], 2, "limit_train_batches=1 would end epochs early"),
    "a share of the batches": (["--trainer.limit_train_batches=0.5"], 2, "limit_train_batches=0.5 would end"),
    "validation by the clock": (["--trainer.val_check_interval=00:00:10:00"], 2,
                                "val_check_interval=.* is a time, .* give a number of batches"),
    "the same batches again": (["--trainer.overfit_batches=2"], 2,
                               r"overfit_batches=2 .*leave it out \(0.0\).*data.limit.*trainer.max_steps"),
    "unknown hub data": (["--data.reader=crossft.data.HuggingFace", "--data.reader.path=nobody/nothing-here"], 1,
                         "data.reader.path='nobody/nothing-here'.*network"),
    "null of no key": (["--model.backbone.nope=null"], 2, "nope"),
    "method without its data": (["--methods.dann=crossft.callbacks.adaptation.DANN", "--source_leg=null",
                                 "--data.source=null"], 2, "needs source rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message_names_what_is_wrong(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags, code, message = CASES[name]
    # one step of the source leg at most: what is wrong must show before or at the start of the target leg
    assert fit(tmp_path, *(["--trainer.max_steps=1"] if "Freeze" not in str(flags) else []), *flags) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("crossft: error: ")
    assert "Traceback" not in printed.err
    assert re.search(message, printed.err.replace("\n", " ")), printed.err
    assert len(printed.err) < 2500


def test_root_is_required(config: Path, tmp_path: Path, capsys) -> None:
    assert main(["fit", f"--config={config}", "--data.source=photo", f"--run.root={tmp_path}"]) == 2
    assert "data.root" in capsys.readouterr().err


def test_config_that_is_no_yaml_or_no_mapping(tmp_path: Path, capsys) -> None:
    for text in ("a: [1", "- 1\n- 2\n", "just words"):
        (tmp_path / "bad.yaml").write_text(text)
        assert main(["fit", f"--config={tmp_path / 'bad.yaml'}", "--data.root=."]) == 2, text
        assert capsys.readouterr().err.startswith("crossft: error: ")


def test_flags_win_wherever_the_config_stands(config: Path) -> None:
    base = ["--data.root=.", "--data.source=a", "--data.target=b"]
    for words in (["--data.batch_size=3", f"--config={config}"], [f"--config={config}", "--data.batch_size=3"]):
        settings = Settings([*base, *words, "--methods.l2sp.weight=2", "--methods.freeze=null"])
        assert settings.config.data.batch_size == 3
        assert {k: v.init_args.weight for k, v in settings.config.methods.items()} == {"l2sp": 2.0}


def test_later_config_replaces_methods_and_keeps_the_rest(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"methods": {"l2sp": None, "mine": {"class_path": L2SP}}}))
    words = [f"--config={config}", f"--config={other}", "--data.root=.", "--data.source=a"]
    settings = Settings(words)
    assert list(settings.config.methods) == ["mine"]
    assert settings.config.data.batch_size == 8


@pytest.mark.parametrize("flag", ["--model.backbone.image_size=null", "--model.backbone.image_size null"])
def test_null_reaches_nested_arguments(config: Path, flag: str) -> None:
    settings = Settings([f"--config={config}", "--data.root=.", "--data.source=a", *flag.split()])
    assert settings.config.model.init_args.backbone.init_args.image_size is None


def test_plain_values_parse_back_to_themselves(config: Path) -> None:
    settings = Settings([f"--config={config}", "--data.root=.", "--data.source=a", "--data.target=b,c"])
    assert Settings(settings.plain()).plain() == settings.plain()


def test_whole_epochs_are_allowed_by_name(config: Path) -> None:
    words = [f"--config={config}", "--data.root=.", "--data.source=a", "--trainer.overfit_batches=0"]
    assert Settings([*words, "--trainer.limit_train_batches=1.0"]).config.trainer.limit_train_batches == 1.0


def test_corrected_command_takes_the_place_of_one_that_failed_at_once(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--source_leg=null", "--trainer.max_steps=1", f"--run.dir={tmp_path / 'run'}"]
    assert fit(tmp_path, *words, "--select=target/val/acuracy") == 2
    assert RunFolder(tmp_path / "run").summary()["status"] == "failed"
    assert "acuracy" in RunFolder(tmp_path / "run").summary()["error"]
    assert fit(tmp_path, *words) == 0
    assert RunFolder(tmp_path / "run").summary()["status"] == "finished"
    assert fit(tmp_path, *words, "--select=target/val/acuracy") == 1, "a finished run is never removed"
