"""FSDP2 from the command line, on two gloo processes: DDP's results, a resume to the same bits, a plain checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossft.callbacks.monitoring import load_checkpoint
from crossft.cli import main
from crossft.cli.leg import build_trainer
from crossft.cli.parser import Settings
from crossft.errors import ConfigError
from crossft.runs import RunFolder, read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: see ``fsdp2_runs.py``."""
    folder = tmp_path_factory.mktemp("fsdp2")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cli")])
    program = [sys.executable, str(ROOT / "tests" / "cli" / "fsdp2_runs.py"), str(folder), str(images)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-4000:]
    (folder / "log.txt").write_text(run.stdout + run.stderr)
    return folder


def leg(done: Path, kind: str, name: str = "default") -> Path:
    """The run folder of a leg of a chain."""
    (found,) = (done / kind / "tiny").glob(f"{name}-*")
    return found


def numbers(run: Path) -> dict[str, float]:
    """Every number of a summary."""
    return {k: v for k, v in RunFolder(run).summary()["metrics"].items() if v is not None}


def close(a: object, b: object, where: str = "") -> None:
    """Nested values of the same form, their numbers within 1e-5."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{where}/{i}")
    else:
        assert a == pytest.approx(b, abs=1e-5) if isinstance(a, float) else a == b, where


def test_all_runs_end_as_they_should(done: Path) -> None:
    codes = json.loads((done / "codes.json").read_text())
    log = (done / "log.txt").read_text()[-4000:]
    assert codes == {"ddp": 0, "fsdp2": 0, "stopped": 143, "resumed": 0}, log


@pytest.mark.parametrize("name", ["source", "default"])
def test_a_sharded_run_ends_where_a_replicated_one_does(done: Path, name: str) -> None:
    """Weights, the optimizer's state, the method's own weights: in value and in form."""
    one, two = (leg(done, kind, name) for kind in ("ddp", "fsdp2"))
    first, second = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, two))
    assert first.keys() == second.keys()
    for part in ("state_dict", "optimizer_states", "terms", "lr_schedulers", "loops", "global_step", "DomainData"):
        close(first[part], second[part], part)
    assert len(second["callbacks"]["Checkpoints"]["rng"]) == 2
    before, after = numbers(one), numbers(two)
    assert len(after) > 10
    close(before, after)


def test_the_chain_measured_its_start_and_shared_it(done: Path) -> None:
    """The source leg's heads are loaded and measured before the fit; the same numbers as under DDP."""
    assert numbers(leg(done, "fsdp2"))["source/retention"] == pytest.approx(1.0, abs=0.5)
    before = [json.loads((leg(done, kind) / "before.json").read_text()) for kind in ("ddp", "fsdp2")]
    assert before[0]["metrics"]
    close(*before)


def test_a_stopped_run_is_resumed_to_the_same_bits(done: Path) -> None:
    whole, resumed = leg(done, "fsdp2"), done / "stopped"
    assert "stopped by SIGTERM at optimizer step" in (done / "log.txt").read_text()
    first, second = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, resumed))
    for part in ("state_dict", "optimizer_states", "terms"):
        flat = [torch.cat([t.double().flatten() for t in tensors(c[part])]) for c in (first, second)]
        assert torch.equal(*flat), part
    assert numbers(whole) == numbers(resumed)
    rows = [[(r.step, r.name, r.value) for r in read_metrics(run / "metrics.csv")] for run in (whole, resumed)]
    assert rows[0] == rows[1]


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [t for v in inner for t in tensors(v)]


def test_its_checkpoint_is_tested_and_exported_by_one_process(done: Path, tmp_path: Path) -> None:
    run, out = leg(done, "fsdp2"), tmp_path / "test.json"
    one = ["--trainer.strategy=auto", "--trainer.devices=1", "--allow=interrupting"]
    assert main(["test", str(run), *one, f"--output={out}"]) == 0
    found = json.loads(out.read_text())
    known = numbers(run)
    after = {k: v for k, v in known.items() if k in found}
    assert len(after) > 4
    close({k: found[k] for k in after}, after)
    assert main(["export", str(run), "--to=timm", str(tmp_path / "plain"), "--allow=interrupting"]) == 0
    assert list((tmp_path / "plain").rglob("*.safetensors"))


def test_strategies_that_shard_in_another_way_are_refused(config: Path) -> None:
    words = [f"--config={config}", "--data.root=.", "--data.source=photo", "--data.target=sketch"]
    strategy = "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}"
    with pytest.raises(ConfigError, match=r"trainer\.strategy=ModelParallelStrategy: .*configs/trainer/fsdp2\.yaml"):
        build_trainer(Settings([*words, strategy]), logger=False)
