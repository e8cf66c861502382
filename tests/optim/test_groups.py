import pytest
import torch
from tiny import TinyVision
from torch import nn

from crossft.errors import ConfigError
from crossft.optim import parameter_groups


def groups(**kwargs):
    backbone = TinyVision()
    heads = nn.ModuleDict({"a": nn.Linear(12, 2)})
    terms = nn.ModuleDict({"dann": nn.Linear(12, 2)})
    return backbone, heads, terms, parameter_groups(backbone.stages, heads, terms, lr=1.0, **kwargs)


def test_every_parameter_is_in_exactly_one_named_group() -> None:
    backbone, heads, terms, made = groups()
    ids = [id(p) for g in made for p in g["params"]]
    everything = [id(p) for m in (backbone, heads, terms) for p in m.parameters()]
    assert sorted(ids) == sorted(everything)
    assert len({g["name"] for g in made}) == len(made)


def test_rates_follow_depth_and_the_head_multiplier() -> None:
    *_, made = groups(layer_decay=0.5, head_multiplier=3.0)
    rates = {g["name"]: g["lr"] for g in made}
    assert rates == {
        "stem/decay": 0.25,
        "stem/no_decay": 0.25,
        "middle/decay": 0.5,
        "middle/no_decay": 0.5,
        "last/decay": 1.0,
        "last/no_decay": 1.0,
        "head.a/decay": 3.0,
        "head.a/no_decay": 3.0,
        "term.dann/decay": 3.0,
        "term.dann/no_decay": 3.0,
    }
    assert all(g["initial_lr"] == g["lr"] for g in made)


def test_vectors_take_no_decay() -> None:
    *_, made = groups(weight_decay=0.1)
    for group in made:
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.1)
        assert all((p.ndim <= 1) == group["name"].endswith("no_decay") for p in group["params"])


def test_a_frozen_parameter_stays_in_its_group_and_does_not_move() -> None:
    backbone, *_, made = groups(weight_decay=0.1)
    weight = backbone.stem[1].weight.requires_grad_(False)
    before = weight.clone()
    optimizer = torch.optim.AdamW(made)
    backbone({"pixel_values": torch.randn(2, 3, 8, 8)}).features.sum().backward()
    optimizer.step()
    assert torch.equal(weight, before)
    assert any(weight is p for g in made for p in g["params"])


@pytest.mark.parametrize("bad", [{"layer_decay": 0.0}, {"layer_decay": 1.5}, {"head_multiplier": 0.0}])
def test_bad_factors_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        groups(**bad)
