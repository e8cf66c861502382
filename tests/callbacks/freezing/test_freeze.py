"""What trains, by every criterion; and the check that it still does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest
import torch
from backbones.tiny_models import images, noised, tiny_text, tiny_timm, tokens
from tiny import TinyVision
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from crossft.backbones import Adapted, Backbone
from crossft.backbones.adapted import AdapterKind
from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.callbacks.freezing.selection import Selection
from crossft.errors import ConfigError, StageError, TrainingError
from crossft.tasks import Classification
from crossft.tasks.trainability import check_trainability, trainable_names
from crossft.types import Domain

DOMAINS = [Domain("photo", "source", labels=("a", "b")), Domain("sketch", "target", labels=("a", "b"))]
STEM = {"stem.1.weight", "stem.1.bias"}
MIDDLE = {"middle.0.weight", "middle.0.bias", "middle.1.weight", "middle.1.bias"}
LAST = {"last.0.weight", "last.0.bias"}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, STEM | MIDDLE | LAST),
        ({"train_last": 0}, set()),
        ({"train_last": 2}, MIDDLE | LAST),
        ({"train": ["middle"]}, MIDDLE),
        ({"train": ["m*", "stem"]}, STEM | MIDDLE),
        ({"match": ["stem.*"]}, STEM),
        ({"match": [r"re:^(stem|last).*weight$"]}, {"stem.1.weight", "last.0.weight"}),
        ({"kinds": ["norm"]}, {"middle.1.weight", "middle.1.bias"}),
        ({"kinds": ["bias"]}, {"stem.1.bias", "middle.0.bias", "middle.1.bias", "last.0.bias"}),
        ({"kinds": ["norm"], "train_last": 1}, {"middle.1.weight", "middle.1.bias"} | LAST),
        ({"kinds": ["bias"], "train_last": 1, "combine": "all"}, {"last.0.bias"}),
        ({"freeze": ["*.bias"]}, {n for n in STEM | MIDDLE | LAST if n.endswith("weight")}),
        ({"train_last": 2, "freeze": ["re:bias"]}, {"middle.0.weight", "middle.1.weight", "last.0.weight"}),
    ],
)
def test_every_criterion_and_their_combinations(choice: dict, expected: set[str]) -> None:
    task = Classification(TinyVision(batchnorm=True), DOMAINS)
    assert Selection(**choice).apply(task) == expected
    assert trainable_names(task.backbone) == expected
    assert all(p.requires_grad for p in task.heads.parameters())
    stages = {"stem": STEM, "middle": MIDDLE, "last": LAST}
    assert task.frozen_stages == {name for name, owned in stages.items() if not owned & expected}


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"train": ["midle"]}, StageError, "'midle'; nearest: middle"),
        ({"match": ["stem.1.wieght"]}, ConfigError, r"'stem.1.wieght' matches no parameter.*nearest: stem.1.weight"),
        ({"freeze": ["bias"]}, ConfigError, r"freeze: 'bias' matches no parameter.*nearest: .*bias"),
        ({"match": ["re:("]}, ConfigError, "not a regular expression"),
        ({"train_last": 4}, ConfigError, "train_last=4 must be between 0 and 3"),
        ({"train_last": -1}, ConfigError, "train_last=-1"),
        ({"kinds": ["norm"]}, ConfigError, "no norm parameters"),
        ({"kinds": ["scale"]}, ConfigError, "'scale' is unknown; allowed: norm, bias, adapter"),
        ({"train": ["stem"], "match": ["last.*"], "combine": "all"}, ConfigError, "chooses no parameter"),
    ],
)
def test_what_finds_nothing_is_an_error_with_the_nearest_names(choice: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Selection(**choice).names(TinyVision())


def test_freeze_needs_a_criterion() -> None:
    with pytest.raises(ConfigError, match="train_last, train, match, kinds or freeze"):
        Freeze()


def test_the_check_sees_parameters_gradients_and_modes() -> None:
    task = Classification(TinyVision(dropout=0.5, batchnorm=True), DOMAINS, batchnorm="training").train()
    expected = Selection(train_last=1).apply(task)

    def check() -> None:
        check_trainability(task.backbone, task.frozen_stages, expected)

    check()
    task.backbone.train()  # the task's own train() would have held the frozen stages
    with pytest.raises(TrainingError, match="'stem' is frozen but in training mode"):
        check()
    task.train()
    check()
    weight = task.backbone.stem[1].weight
    weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"'stem\.1\.weight' trains, against what was set"):
        check()
    weight.requires_grad_(False)
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(TrainingError, match="holds a gradient"):
        check()


VISION = ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224"]
DROPS = ["test_efficientnet", "test_vit", "swin_tiny_patch4_window7_224"]
TEXT = ["bert", "distilbert", "roberta", "deberta-v2"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, so that DDP says what its reducer holds."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def deepest(backbone: Backbone) -> list[str]:
    """The last stage that adapters fit into."""
    able = [
        s.name for s in backbone.stages if any(isinstance(m, torch.nn.Linear) for o in s.modules for m in o.modules())
    ]
    return able[-1:] or [backbone.stages[-2].name]


def strategies(task: Classification) -> dict[str, Selection]:
    """Every shipped strategy: what it trains, phase by phase."""
    names = [s.name for s in task.backbone.stages]
    chosen = {
        "probe": Selection(train_last=0),
        "last-stages": Selection(train_last=2),
        "by name": Selection(train=[names[1]]),
        "by pattern": Selection(match=["re:weight$"]),
        "norm": Selection(kinds=["norm"]),
        "bitfit": Selection(kinds=["bias"]),
        "last norms": Selection(kinds=["norm"], train_last=2, combine="all"),
        "all but": Selection(freeze=["*.bias"]),
    }
    for name, method in {
        "ulmfit": GradualUnfreezing(every=Phase(epochs=1), first=1),
        "lp-ft": GradualUnfreezing([Phase(train_last=0, share=0.3), Phase()]),
        "gradual": GradualUnfreezing(every=Phase(patience=1), by=2, monitor="target/val/loss"),
    }.items():
        chosen |= {f"{name}/{i}": phase for i, phase in enumerate(method.plan_for(task))}
    return chosen


def one_step(task: Classification, inputs: dict, expected: frozenset[str], label: str) -> None:
    """Trainable, seen by the reducer, with a gradient, and moved are the same parameters; what is frozen stands still.

    No frozen buffer moves, and what comes out of the frozen stages below the first that trains is in training mode
    what it is in evaluation mode.
    """
    parameters = dict(task.named_parameters())
    optimizer = torch.optim.AdamW(task.named_groups(), lr=1e-2, weight_decay=0.1)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    frozen = [s for s in task.backbone.stages if s.name in task.frozen_stages]
    held = [b for s in frozen for m in s.modules for b in m.buffers()]
    buffers = [b.clone() for b in held]
    wrapped = DistributedDataParallel(task)
    trains = {f"backbone.{n}" for n in expected} | {f"heads.{n}" for n, _ in task.heads.named_parameters()}
    assert wrapped._get_ddp_logging_data()["num_parameter_tensors"] == len(trains), label
    torch.manual_seed(0)
    logits = wrapped(inputs)
    (logits * torch.randn(logits.shape)).sum().backward()
    assert {n for n, p in parameters.items() if p.grad is not None} == trains, label
    optimizer.step()
    assert {n for n, p in parameters.items() if not torch.equal(p, before[n])} == trains, label
    assert all(torch.equal(a, b) for a, b in zip(held, buffers, strict=True)), label
    check_trainability(task.backbone, task.frozen_stages, expected)
    below = list(takewhile(lambda stage: stage.name in task.frozen_stages, task.backbone.stages))
    if 0 < len(below) < len(task.backbone.stages):
        with torch.no_grad():
            trained = task.backbone(inputs, capture=[below[-1].name]).stages[below[-1].name]
            assert torch.equal(trained, task.eval().backbone(inputs, capture=[below[-1].name]).stages[below[-1].name])
        task.train()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_trainable_is_reduced_is_has_a_gradient_is_moved(name: str, tmp_path: Path, one_process: None) -> None:
    """On shipped families and strategies: only what trains moves, and frozen features are the same in training mode."""
    drops = {"drop_path_rate": 0.1} if name in DROPS else {}
    backbone = tiny_timm(name, **drops) if name in VISION else tiny_text(name, tmp_path / name)
    noised(backbone)  # zero-initialized branches have zero gradients
    inputs = images(backbone, 2) if name in VISION else tokens(2)
    task = Classification(copy.deepcopy(backbone), DOMAINS, batchnorm="training").train()
    for label, choice in strategies(task).items():
        one_step(task, inputs, choice.apply(task), label)
    Selection(train_last=0).apply(task)
    assert torch.equal(task.backbone(inputs).features, task.eval().backbone(inputs).features)
    for kind in get_args(AdapterKind):
        net = noised(Adapted(copy.deepcopy(backbone), kind, rank=2, stages=deepest(backbone)))
        adapted = Classification(net, DOMAINS, batchnorm="training").train()
        chosen = Selection(kinds=["adapter"]).names(net)
        assert trainable_names(net) == chosen
        assert adapted.frozen_stages
        one_step(adapted, inputs, chosen, kind)
    adapted = Classification(noised(Adapted(backbone, rank=2)), DOMAINS, batchnorm="training").train()
    for phase in (Selection(kinds=["adapter"]), Selection(kinds=["adapter"], train_last=2, combine="all"), Selection()):
        one_step(adapted, inputs, phase.apply(adapted), f"lora {phase}")


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_gradients_survive_checkpointing_and_compilation_through_phases(how: str, tmp_path: Path) -> None:
    """TRAP 9: checkpointing over frozen early layers, and a compiled graph of an earlier phase."""
    inputs = tokens(2) if how == "checkpointed" else {"pixel_values": torch.randn(2, 3, 8, 8)}
    plain, other = (
        Classification(
            noised(tiny_text("bert", tmp_path / "bert", checkpoint_grads=own))
            if how == "checkpointed"
            else TinyVision(),
            DOMAINS,
        ).train()
        for own in (False, True)
    )
    other.load_state_dict(plain.state_dict())
    run = torch.compile(other.backbone, backend="aot_eager") if how == "compiled" else other.backbone
    for phase in (Selection(train_last=1), Selection(), Selection(kinds=["bias"]), Selection(train_last=2)):
        grads = []
        for task, net in ((plain, plain.backbone), (other, run)):
            phase.apply(task)
            task.zero_grad()
            torch.manual_seed(0)
            net(inputs).features.square().sum().backward()
            grads.append({n: p.grad for n, p in task.backbone.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() == phase.names(plain.backbone)
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)
