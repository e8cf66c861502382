"""Everything works without the command line: the example of README, on the small data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from crossft.cli import main

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_example(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The code block of README as it stands, with the data's folder and a tiny backbone put in."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(code.splitlines()) <= 15
    for old, new in (
        ('"DIR"', repr(str(images))),
        ('Timm("packaged:efficientnet_lite0", image_size=96)', 'Timm("test_resnet", weights=None, image_size=32)'),
        ("shots=10", "shots=5, batch_size=8"),
        ("max_epochs=5", "max_epochs=3, accelerator='cpu', enable_progress_bar=False"),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    measured = {key for part in names["after"] for key in part}
    assert {"target/test/accuracy", "source/test/accuracy", "target/test/macro_f1"} <= measured
    assert names["before"] != names["after"], "nothing was trained"
    assert names["trainer"].global_step == 3 * names["data"].steps_per_epoch
    assert set(names["task"].attachments.penalties) == {"l2sp"}


def test_python_and_command_line_give_the_same_bits(images: Path, config: Path, tmp_path: Path) -> None:
    """One leg from scratch, both ways."""
    from lightning import Trainer, seed_everything

    from crossft.backbones import Timm
    from crossft.callbacks.monitoring import load_checkpoint
    from crossft.data import DomainData
    from crossft.tasks import Classification

    folder = tmp_path / "run"
    words = [f"--config={config}", f"--data.root={images}", "--data.source=photo", "--data.target=sketch"]
    flags = ["--source_leg=null", "--methods.l2sp=null", "--methods.freeze=null", f"--run.dir={folder}"]
    assert main(["fit", *words, *flags, "--seed_everything=5", "--trainer.max_epochs=1"]) == 0

    data = DomainData(images, source="photo", target="sketch", batch_size=8, seed=5)
    data.prepare()
    seed_everything(5, verbose=False)
    backbone = Timm("test_resnet", weights=None, image_size=32)
    task = Classification(backbone, list(data.domains), optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.003))
    seed_everything(5, verbose=False)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(task, data)
    saved = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    mine = task.state_dict()
    assert saved.keys() == mine.keys()
    different = [k for k in saved if not torch.equal(saved[k], mine[k])]
    assert not different
