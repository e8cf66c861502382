"""Adapters on timm and transformers: start where the backbone is, train alone, merge to equal outputs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from backbones.tiny_models import images, noised, tiny_text, tiny_timm, tokens

from crossft.backbones import Adapted, Backbone, Timm, Transformer
from crossft.backbones.base import check_partition
from crossft.callbacks.freezing.selection import Selection
from crossft.errors import ConfigError, StageError
from crossft.tasks import Classification
from crossft.types import Domain

pytest.importorskip("peft")
DOMAINS = [Domain("photo", "source", labels=("a", "b"))]


def build(name: str, folder: Path) -> tuple[Backbone, dict[str, torch.Tensor]]:
    net = tiny_timm(name) if name.startswith("test_") else tiny_text(name, folder / name)
    noised(net)
    return net, images(net, 2) if name.startswith("test_") else tokens(2)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "bert", "distilbert"])
def test_adapters_start_as_identity_train_alone_and_merge(name: str, kind: str, tmp_path: Path) -> None:
    plain, inputs = build(name, tmp_path)
    plain.eval()
    before = plain(inputs).features
    net = Adapted(copy.deepcopy(plain), kind, rank=2, alpha=4).eval()
    check_partition(net)
    assert [s.name for s in net.stages] == [s.name for s in plain.stages]
    torch.testing.assert_close(net(inputs).features, before, atol=1e-5, rtol=1e-5)
    task = Classification(net, DOMAINS, batchnorm="frozen").train()
    expected = Selection(kinds=["adapter"]).names(net)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == expected
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.02)
    torch.manual_seed(0)
    for _ in range(2):  # lora_A has no gradient while lora_B is zero
        optimizer.zero_grad()
        task.heads["photo"](net(inputs).features).square().sum().backward()
        optimizer.step()
    assert {n for n, p in net.named_parameters() if not torch.equal(p, old[n])} == expected
    net.eval()
    after = net(inputs).features
    assert (after - before).abs().max() > 1e-4
    merged = net.merged().eval()
    torch.testing.assert_close(merged(inputs).features, after, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_export_is_the_plain_model_with_the_adapters_merged_in(name: str, tmp_path: Path) -> None:
    plain, inputs = build(name, tmp_path)
    net = noised(Adapted(plain, rank=2, alpha=4)).eval()
    expected = net(inputs).features
    folder = net.export(tmp_path / "out")
    other = Timm(str(folder))
    assert not any("lora" in key for key in other.state_dict())
    torch.testing.assert_close(other.eval()(inputs).features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_export_of_a_text_backbone_is_what_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    plain, inputs = build("bert", tmp_path)
    net = noised(Adapted(plain, kind, rank=2, alpha=4)).eval()
    expected = net(inputs)
    folder = net.export(tmp_path / "out")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert not any("lora" in key or "ia3" in key or "base_layer" in key for key in model.state_dict())
    found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found[expected.mask], expected.tokens[expected.mask], atol=1e-4, rtol=1e-4)
    other = Transformer(str(folder), max_length=32).eval()
    torch.testing.assert_close(other(inputs).features, expected.features, atol=1e-4, rtol=1e-4)


def test_stages_targets_states_and_phases(tmp_path: Path) -> None:
    plain, _ = build("test_vit", tmp_path)
    net = Adapted(plain, rank=2, stages=["blocks.4", "blocks.5"], targets=["*.attn.qkv"])
    names = Selection(kinds=["adapter"]).names(net)
    assert {n.split(".lora_")[0] for n in names} == {f"inner.model.blocks.{i}.attn.qkv" for i in (4, 5)}
    assert Selection(kinds=["adapter"], train_last=2, combine="all").names(net) < names
    task = Classification(net, DOMAINS)
    Selection(train_last=1).apply(task)  # a phase thaws a stage with its own weights
    assert "blocks.5" in task.frozen_stages
    other = Adapted(tiny_timm("test_vit"), rank=2, stages=["blocks.4", "blocks.5"], targets=["*.attn.qkv"])
    other.load_state_dict(net.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_run_without_adapters_is_loaded_whole_or_not_at_all(name: str, kind: str, tmp_path: Path) -> None:
    plain, inputs = build(name, tmp_path)
    state = plain.state_dict()
    net = Adapted(tiny_timm(name), kind, rank=2)
    net.load_state_dict(dict(state))
    torch.testing.assert_close(net.eval()(inputs).features, plain.eval()(inputs).features)
    norm = next(key for key in reversed(state) if "norm" in key or key.endswith("running_var"))
    first = next(key for key in state if key.endswith("weight"))
    for gone in (norm, first):
        part = {key: value for key, value in state.items() if key != gone}
        layer, last = gone.rsplit(".", 1)
        with pytest.raises(RuntimeError, match=rf"Missing key.*\"inner\.{layer}\.(base_layer\.)?{last}\""):
            net.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"inner\.model\.other\.weight"'):
        net.load_state_dict({**state, "model.other.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "prefix"}, ConfigError, "'prefix' is unknown; allowed: lora, dora, ia3"),
        ({"rank": 0}, ConfigError, "rank=0"),
        ({"stages": ["blocks.9"]}, StageError, r"'blocks\.9'"),
        ({"targets": ["*.query"]}, ConfigError, r"'\*\.query' matches no layer"),
    ],
)
def test_bad_settings_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Adapted(tiny_timm("test_vit"), **options)
