"""Hostile configs, checkpoints and run folders: none of them runs anything, and each is refused with a clear error.

Every gadget would create a marker file; no test may leave one.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from crossft.callbacks.monitoring import AtomicCheckpointIO, latest_valid, load_checkpoint
from crossft.callbacks.monitoring.checkpoint_io import manifest_of
from crossft.cli import main
from crossft.cli.leg import build_trainer
from crossft.cli.parser import Settings
from crossft.errors import CheckpointError, ConfigError, UnsafeCheckpointError, UnsafeConfigError
from crossft.runs import RunFolder


@pytest.fixture(autouse=True)
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file a gadget would create."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists(), "a gadget ran"


class Gadget:
    """Unpickled, it creates the marker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


# -- class paths in every place that takes one ---------------------------------------------------------------------

PATHS = ["os.system", "subprocess.Popen", "builtins.eval", "torch.os.system", "importlib.import_module", "pickle.loads",
         "jsonargparse.set_parsing_settings", "torch.hub.load", "torch.load", "transformers.pipeline"]  # fmt: skip
PLACES = [
    "methods.x",
    "model",
    "model.init_args.optimizer",
    "model.init_args.schedule",
    "model.init_args.backbone",
    "data.reader",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.strategy",
    "trainer.profiler",
    "trainer.plugins",
]


def nested(place: str, value: object) -> dict:
    *parents, last = place.split(".")
    out: dict = {last: value}
    for name in reversed(parents):
        out = {name: out}
    if place.startswith("model."):
        out["model"]["class_path"] = "crossft.tasks.Classification"
    return out


@pytest.mark.parametrize("place", PLACES)
def test_class_path_outside_the_allowed_packages(place: str, config: Path, tmp_path: Path, marker: Path) -> None:
    hostile = tmp_path / "hostile.yaml"
    words = [f"--config={config}", f"--config={hostile}", "--data.root=.", "--data.source=a"]
    listed = place in ("trainer.callbacks", "trainer.plugins")
    for path in PATHS:
        for value in ({"class_path": path, "dict_kwargs": {"args": f"touch {marker}", "shell": True}}, path):
            hostile.write_text(yaml.safe_dump(nested(place, [value] if listed else value)))
            # a plain text may parse where a type takes names (trainer.strategy): then building refuses the name
            with pytest.raises(ConfigError, match="(?i)" + re.escape(path.rpartition(".")[2]) + "|simple"):
                build_trainer(Settings(words))


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "posix.system"])
def test_message_names_the_path_and_the_remedy(path: str, config: Path) -> None:
    words = [f"--config={config}", "--data.root=.", "--data.source=a", f"--methods.x={path}"]
    with pytest.raises(UnsafeConfigError, match=rf"'{path}'.*--allow {path.split('.')[0]}"):
        Settings(words)


def test_functions_are_no_values_even_in_allowed_packages(config: Path) -> None:
    hook = "lightning.pytorch.callbacks.LambdaCallback"
    words = [f"--config={config}", "--data.root=.", "--data.source=a", f"--methods.x={hook}"]
    with pytest.raises(UnsafeConfigError, match="names a function"):
        Settings([*words, "--methods.x.on_fit_start=torch.hub.load"])


def test_allow_stands_on_the_command_line_only(config: Path, tmp_path: Path) -> None:
    (tmp_path / "allow.yaml").write_text("allow: interrupting\n")
    base = [f"--config={config}", "--data.root=.", "--data.source=a"]
    with pytest.raises(ConfigError):
        Settings([*base, f"--config={tmp_path / 'allow.yaml'}"])
    mine = [*base, "--trainer.callbacks=interrupting.StopAt"]
    assert Settings([*mine, "--allow=interrupting"]).config.trainer.callbacks
    with pytest.raises(UnsafeConfigError, match="--allow interrupting"):
        Settings(mine)
    with pytest.raises(ConfigError, match="cannot be allowed"):
        Settings([*mine, "--allow=jsonargparse"])


def test_a_torch_data_set_of_ones_own_needs_allow(config: Path, tmp_path: Path) -> None:
    item = {"class_path": "interrupting.Noise", "init_args": {"seed": 3}}
    reader = {"class_path": "crossft.data.TorchDatasets", "init_args": {"datasets": {"noise": item}}}
    words = [f"--config={config}", "--data.root=.", "--data.target=noise", f"--data.reader={json.dumps(reader)}"]
    with pytest.raises(UnsafeConfigError, match="--allow interrupting"):
        Settings(words)
    data = Settings([*words, "--allow=interrupting"]).build("data").data
    data.prepare()
    assert data.domains[0].labels == ("0", "1")
    assert data.reader.datasets["noise"].seed == 3


def test_source_leg_cannot_name_what_the_config_cannot(
    config: Path, fit: Callable[..., int], tmp_path: Path, capsys
) -> None:
    for override in ({"methods": {"x": {"class_path": "os.system"}}}, {"trainer": {"callbacks": ["subprocess.Popen"]}}):
        assert fit(tmp_path, f"--source_leg={json.dumps(override)}") == 2
        assert "lies outside the packages" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


# -- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch {0}']",
        "data: !!python/object/new:os.system ['touch {0}']",
        "data: !!python/name:os.system",
        "data: !!python/module:os",
        "experiment: !!python/object/apply:subprocess.Popen [['touch', '{0}']]",
    ],
)
def test_yaml_tags_make_nothing(text: str, config: Path, tmp_path: Path, marker: Path, capsys) -> None:
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text(text.format(marker))
    code = main(["fit", f"--config={config}", f"--config={hostile}", "--data.root=.", "--data.source=a"])
    assert code == 2
    assert "python" in capsys.readouterr().err


# -- checkpoints ---------------------------------------------------------------------------------------------------


def rewrite(folder: Path, copy: Path, **extra: object) -> Path:
    """A copy of a run whose last checkpoint holds more, with a manifest that fits it."""
    shutil.copytree(folder, copy)
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint({**checkpoint, **extra}, copy / "checkpoints" / "last.ckpt")
    return copy


def commands(run: Path, fit: Callable[..., int], images: Path, tmp_path: Path) -> Iterator[int]:
    """Exit codes of every command that reads a checkpoint."""
    picture = next(images.rglob("*.png"))
    yield main(["test", str(run)])
    yield main(["predict", str(run), "--data.inputs", str(picture), "--output", str(tmp_path / "o.csv")])
    yield main(["export", str(run), "--to", "timm", str(tmp_path / "export")])
    yield fit(tmp_path / "from", f"--init={run}", "--trainer.max_steps=1")


def test_pickle_gadget_in_a_checkpoint(
    finished: Path, fit: Callable[..., int], images: Path, tmp_path: Path, marker: Path, capsys
) -> None:
    run = rewrite(finished, tmp_path / "run", gadget=Gadget(marker))
    for code in commands(run, fit, images, tmp_path):
        assert code == 1
        assert "more than tensors and plain values" in capsys.readouterr().err
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint(run / "checkpoints" / "last.ckpt")


def test_plain_pickle_named_like_a_checkpoint(finished: Path, tmp_path: Path, marker: Path, fit, capsys) -> None:
    file = tmp_path / "evil.ckpt"
    file.write_bytes(pickle.dumps(Gadget(marker)))
    assert fit(tmp_path / "from", f"--init={file}") == 1
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("key", ["hyper_parameters", "datamodule_hyper_parameters"])
@pytest.mark.parametrize("name", ["_class_path", "_instantiator"])
def test_hyper_parameters_that_name_what_to_build_are_refused(
    finished: Path, fit: Callable[..., int], images: Path, tmp_path: Path, marker: Path, key: str, name: str, capsys
) -> None:
    run = rewrite(finished, tmp_path / "run", **{key: {name: "os.system", "command": f"touch {marker}"}})
    for code in commands(run, fit, images, tmp_path):
        assert code == 1
        assert f"names code to run ({key}/{name}: 'os.system')" in capsys.readouterr().err
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint(run / "checkpoints" / "last.ckpt")


def test_hyper_parameters_of_a_checkpoint_are_not_read(
    finished: Path, fit: Callable[..., int], images: Path, tmp_path: Path, marker: Path
) -> None:
    """As plain Lightning modules write them, whatever they hold."""
    hostile = {
        "hyper_parameters": {
            "args": ["touch", str(marker)],
            "backbone": {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}},
            "label_smoothing": 0.9,
        },
        "hparams_name": "kwargs",
    }
    run = rewrite(finished, tmp_path / "run", **hostile)
    for code in commands(run, fit, images, tmp_path):
        assert code == 0
    (new,) = (tmp_path / "from" / "tiny").iterdir()
    assert yaml.safe_load((new / "config.yaml").read_text())["model"]["init_args"]["label_smoothing"] == 0.0


def test_checkpoint_of_a_run_without_its_manifest(
    finished: Path, fit: Callable[..., int], images: Path, tmp_path: Path, capsys
) -> None:
    """By the run and by the file's own path; a copy elsewhere is a foreign file, and may have none."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoints" / "last.ckpt"
    manifest_of(file).unlink()
    for named in (run, file):
        for code in commands(named, fit, images, tmp_path):
            assert code == 1
            assert "last.ckpt has no manifest" in capsys.readouterr().err
    shutil.copy(file, tmp_path / "copy.ckpt")
    assert fit(tmp_path / "from", f"--init={tmp_path / 'copy.ckpt'}", "--trainer.max_steps=1") == 0


def test_unfinished_run_whose_last_checkpoint_is_damaged(
    finished: Path, fit: Callable[..., int], images: Path, tmp_path: Path, capsys
) -> None:
    """Its newest valid one is taken, and every command says so; without any, each fails."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    RunFolder(run).write_summary(status="interrupted", checkpoint=None)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half")
    newest = latest_valid(run / "checkpoints")
    assert newest is not None
    for code in commands(run, fit, images, tmp_path):
        assert code == 0
        assert f"taken instead: {newest.name}, the newest valid one" in capsys.readouterr().out
    for path in (run / "checkpoints").glob("step-*.manifest.json"):
        path.unlink()
    assert main(["test", str(run)]) == 1
    assert "does not match the checksum" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02Nb.", b"\x80\x02K\x01K\x02s.", b"", b"PK\x03\x04"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_no_pickler_wrote(
    finished: Path, fit: Callable[..., int], tmp_path: Path, content: bytes, zipped: bool, capsys
) -> None:
    file = tmp_path / "odd.ckpt"
    file.write_bytes(content)
    if zipped:
        torch.save({}, file)
        with zipfile.ZipFile(file) as whole:
            parts = {name: whole.read(name) for name in whole.namelist()}
        with zipfile.ZipFile(file, "w") as odd:
            for name, part in parts.items():
                odd.writestr(name, content if name.endswith("data.pkl") else part)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load_checkpoint(file)
    assert fit(tmp_path / "from", f"--init={file}") == 1
    assert str(file) in capsys.readouterr().err


def test_foreign_and_malformed_checkpoints(finished: Path, fit: Callable[..., int], tmp_path: Path, capsys) -> None:
    for name, content in {
        "weights": {"state_dict": {}},
        "list": [1, 2],
        "domains": {"state_dict": {}, "domains": [{"name": "a"}]},
    }.items():
        file = tmp_path / f"{name}.ckpt"
        torch.save(content, file)
        assert fit(tmp_path / "from", f"--init={file}") == 1
        assert str(file) in capsys.readouterr().err


# -- paths that leave their folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "/absolute", "..", ".hidden", "", "a\nb", "-x"])
@pytest.mark.parametrize("key", ["experiment", "arm"])
def test_names_that_would_leave_the_root_of_the_runs(
    fit: Callable[..., int], tmp_path: Path, key: str, name: str, capsys
) -> None:
    root = tmp_path / "deep" / "runs"
    assert fit(root, f"--{key}={name}") == 2
    assert f"{key}={name!r} must be a plain name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("path", ["../../elsewhere.ckpt", "/etc/passwd", "checkpoints/../../elsewhere.ckpt"])
def test_summary_that_names_a_file_elsewhere(finished: Path, tmp_path: Path, path: str, capsys) -> None:
    run = tmp_path / "a" / "run"
    shutil.copytree(finished, run)
    shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path / "elsewhere.ckpt")
    shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path / "a" / "elsewhere.ckpt")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "checkpoint": path}))
    assert main(["test", str(run)]) == 1
    assert "lies outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ['{"runs": ["../other.ckpt"]}', '{"runs": ["ABSOLUTE"]}', '{"runs": ["."]}', '{"runs": ["1-b", "1-b/.."]}',
     '{"runs": ["a\\u0000b"]}', '{"runs": [3]}', '{"runs": []}', '{"runs": {"a": 1}}', "{}", "[]", "null", "no JSON"],
)  # fmt: skip
def test_sequence_that_names_a_leg_elsewhere(finished: Path, tmp_path: Path, text: str, fit, capsys) -> None:
    run, other = tmp_path / "run", tmp_path / "other.ckpt"
    shutil.copytree(finished, run)
    shutil.copy(finished / "checkpoints" / "last.ckpt", other)
    (run / "sequence.json").write_text(text.replace("ABSOLUTE", str(other)))
    assert main(["test", str(run)]) == 1
    assert "sequence.json" in capsys.readouterr().err
    assert fit(tmp_path / "from", f"--init={run}") == 1
    assert "sequence.json" in capsys.readouterr().err


def test_before_that_holds_no_metrics(fit: Callable[..., int], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("STOP_IN", "target")
    monkeypatch.setenv("STOP_AT", "0")
    run, words = tmp_path / "run", ["--trainer.callbacks=interrupting.StopAt", "--allow=interrupting"]
    assert fit(tmp_path, *words, "--source_leg=null", f"--run.dir={run}") == 143
    for text in ("{}", "[]", "null", '{"metrics": [1]}', '{"metrics": {"a": "b"}}', "no JSON"):
        (run / "before.json").write_text(text)
        capsys.readouterr()
        assert main(["resume", str(run), "--allow=interrupting"]) == 1
        assert "before.json" in capsys.readouterr().err


def test_manifest_that_names_another_file(finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = run / "checkpoints" / "last.ckpt.manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "file": "../../../etc/passwd"}))
    assert main(["test", str(run)]) == 1
    assert "manifest" in capsys.readouterr().err


def test_anchors_outside_their_folder(finished: Path, tmp_path: Path) -> None:
    from crossft.callbacks.monitoring import Anchors

    for name in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors"):
        with pytest.raises(CheckpointError, match="plain file name"):
            Anchors(tmp_path, write=False).get({"file": name, "sha256": "0"})


def test_splits_that_are_not_the_datas(finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    splits = json.loads((run / "splits.json").read_text())
    splits["sketch"]["test"] = [*splits["sketch"]["test"][:-1], "../../etc/passwd"]
    (run / "splits.json").write_text(json.dumps(splits))
    assert main(["test", str(run)]) == 1
    assert "sample ids" in capsys.readouterr().err
