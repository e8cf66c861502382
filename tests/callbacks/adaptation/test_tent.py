"""Tent: each batch is predicted, then adapted on; domains start afresh; the model comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adaptation_cases import data_of
from lightning.pytorch import Callback, Trainer
from tiny import TinyVision, flat, image_domains, permute_labels
from torch import nn

from crossft.callbacks.adaptation import Tent
from crossft.errors import ConfigError
from crossft.tasks import Classification


class Norms(TinyVision):
    """BatchNorm in the middle, LayerNorm in the last stage."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.last = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh())


class Watch(Callback):
    """Keeps the logits that each test batch was judged by."""

    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.inputs: dict[int, list[torch.Tensor]] = {}

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.setdefault(dataloader_idx, []).append(
            pl_module.heads["photo"](pl_module.backbone(batch.inputs).features).clone()
        )
        self.inputs.setdefault(dataloader_idx, []).append(batch.inputs["pixel_values"].clone())


def run(root: Path, tent: Tent | None, task: Classification | None = None, size: int = 4):
    torch.manual_seed(0)
    data = data_of(root, False, eval_batch_size=size)
    task = task or Classification(Norms(), list(data.domains))
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*([tent] if tent else []), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.test(task, data, verbose=False)
    return task, watch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images"), each=24)


def test_it_is_the_published_loop_on_the_target_and_nothing_on_the_source(root: Path) -> None:
    task, watch = run(root, Tent(lr=0.05))
    before = flat(task)
    _, plain = run(root, None)
    assert all(torch.equal(a, b) for a, b in zip(watch.seen[0], plain.seen[0], strict=True))  # the source

    torch.manual_seed(0)
    reference = Classification(Norms(), list(data_of(root, False).domains)).eval()
    assert torch.equal(flat(reference), before)  # put back, statistics too
    norms = [m for m in reference.backbone.modules() if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)]
    for layer in norms:
        if isinstance(layer, nn.BatchNorm1d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    adam = torch.optim.Adam([p for m in norms for p in m.parameters()], lr=0.05)
    assert len(watch.inputs[1]) >= 3
    for pixels, seen in zip(watch.inputs[1], watch.seen[1], strict=True):
        logits = reference.heads["photo"](reference.backbone({"pixel_values": pixels.clone()}).features)
        assert torch.allclose(logits, seen, atol=1e-5)
        p = logits.softmax(1)
        adam.zero_grad()
        (-(p * p.log()).sum(1).mean()).backward()
        adam.step()
    assert not torch.allclose(logits, plain.seen[1][-1], atol=1e-3)


def test_permuting_the_labels_of_the_target_changes_no_prediction(root: Path, tmp_path: Path) -> None:
    """Rows come in an order that their content sets, so the batches stay the same too."""
    _, watch = run(root, Tent(lr=0.05))
    _, other = run(permute_labels(root, tmp_path / "permuted"), Tent(lr=0.05))
    for a, b in zip(watch.seen[1], other.seen[1], strict=True):
        assert torch.equal(a, b)


def test_a_last_batch_of_one_row_is_normalized_as_trained(root: Path) -> None:
    rows = sum(len(p.rows("test")) for p in data_of(root, False).prepared if p.domain.name == "sketch")
    _, watch = run(root, Tent(lr=1e-9), size=rows - 1)
    _, plain = run(root, None, size=rows - 1)
    assert [len(x) for x in watch.inputs[1]] == [rows - 1, 1]
    assert not torch.allclose(watch.seen[1][0], plain.seen[1][0], atol=1e-3)
    assert torch.allclose(watch.seen[1][1], plain.seen[1][1], atol=1e-5)


def test_frozen_parameters_stay_frozen(root: Path) -> None:
    task = Classification(Norms(), list(data_of(root, False).domains))
    task.backbone.requires_grad_(False)
    run(root, Tent(), task)
    assert not any(p.requires_grad for p in task.backbone.parameters())
    assert all(p.grad is None for p in task.parameters())


def test_named_domains_are_adapted_each_from_the_start(root: Path) -> None:
    _, both = run(root, Tent(lr=0.05, domains=["photo", "sketch"]))
    _, one = run(root, Tent(lr=0.05))
    _, plain = run(root, None)
    assert not torch.allclose(both.seen[0][-1], plain.seen[0][-1], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(both.seen[1], one.seen[1], strict=True))


def test_what_cannot_work_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr=0 must be positive"):
        Tent(lr=0)
    with pytest.raises(ConfigError, match=r"'art' is not one of photo, sketch"):
        run(root, Tent(domains=["art"]))
    with pytest.raises(ConfigError, match="the backbone has none"):
        run(root, Tent(), Classification(TinyVision(), list(data_of(root, False).domains)))
