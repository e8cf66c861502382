"""Every backbone family: what runs from a stored value ends where the full path ends, with the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones.tiny_models import CHAINS, TEXTS, WHOLES, images, noised, tiny_text, tiny_timm, tokens
from tiny import TinyVision

from crossft.backbones import Backbone
from crossft.callbacks.caching.cuts import Cut, Value, cuts
from crossft.types import Batch


def batch_of(inputs: dict[str, torch.Tensor]) -> Batch:
    rows = len(next(iter(inputs.values())))
    ids = torch.arange(rows)
    return Batch(inputs, ids, torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.long), ids)


def check(backbone: Backbone, cut: Cut, batch: Batch) -> None:
    """Values are computed row by row, each without the padding it does not need."""
    backbone.requires_grad_(True)
    for stage in cut.below:
        for parameter in stage.parameters():
            parameter.requires_grad_(False)
    parts = [cut.value(backbone, batch, [row]) for row in range(len(batch))]
    mask = None if parts[0].mask is None else batch.inputs["attention_mask"].bool()
    value = Value(torch.cat([part.flat for part in parts]), mask)
    full, known = cut.whole(backbone, batch, ())
    assert torch.allclose(known.flat, value.flat, atol=1e-5)
    mine = cut.rest(backbone, value, batch, ())
    assert torch.allclose(mine.features, full.features, atol=1e-5)
    above = [p for p in backbone.parameters() if p.requires_grad]
    if above:
        weight = torch.linspace(-1, 1, full.features.numel()).view_as(full.features)
        gradients = [
            torch.autograd.grad((e.features * weight).sum(), above, allow_unused=True) for e in (full, mine)
        ]  # fmt: skip
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-4 * float(a.abs().max()) + 1e-6)


def check_all(backbone: Backbone, batch: Batch) -> int:
    """The cuts of a linear probe, of the last stage, and of the first alone."""
    backbone.eval()
    names = [stage.name for stage in backbone.stages]
    found: dict[str, Cut] = {}
    for frozen in (names, names[:-1], names[:1]):
        for cut in cuts(backbone, frozen, ())[0]:
            found.setdefault(cut.name, cut)
    for cut in found.values():
        check(backbone, cut, batch)
    return len(found)


@pytest.mark.parametrize("name", [*CHAINS, *WHOLES])
def test_vision(name: str) -> None:
    backbone, inputs = noised(tiny_timm(name)), images(tiny_timm(name), 2)
    if name == "vgg11":  # without a norm, one rectifier that switches with a last bit shows in the gradients
        backbone, inputs = backbone.double(), {k: v.double() for k, v in inputs.items()}
    count = check_all(backbone, batch_of(inputs))
    assert count == (1 if name in WHOLES else 3 if len(backbone.stages) > 2 else 2)


@pytest.mark.parametrize("kind", TEXTS)
def test_text(kind: str, tmp_path: Path) -> None:
    backbone = noised(tiny_text(kind, tmp_path))
    count = check_all(backbone, batch_of(tokens(3)))
    stages = len(backbone.stages)
    assert count == (1 if backbone.can_start_from(backbone.stages[-1].name) else min(stages, 3))


def test_what_is_read_moves_the_cut() -> None:
    net = TinyVision()
    everything = ["stem", "middle", "last"]

    def found(frozen: list[str], needed: list[str], tokens: bool = False) -> list[str]:
        return [cut.name for cut in cuts(net, frozen, needed, tokens)[0]]

    assert found(everything, []) == ["features", "last"]
    assert found(everything, [], tokens=True) == ["last"]
    assert found(everything, ["last"]) == ["last"]
    assert found(everything, ["middle", "last"]) == ["last"]
    assert found(everything, ["stem"]) == ["middle"]
    assert found(["stem", "last"], []) == ["middle"]  # only what is frozen from the first stage on
    assert found(["middle", "last"], []) == []
    (cut,) = cuts(net, everything, ["middle"])[0]
    assert cut.allows(["middle"])
    assert cut.allows(["last"])
    assert not cut.allows(["stem"])


def test_captured_stages_come_with_it() -> None:
    net = TinyVision().eval()
    batch = batch_of({"pixel_values": torch.randn(4, 3, 8, 8)})
    (cut,) = cuts(net, ["stem", "middle"], [])[0]
    full, value = cut.whole(net, batch, ("last",))
    assert set(full.stages) == {"last"}
    mine = cut.rest(net, value, batch, ("middle", "last"))
    assert torch.equal(mine.stages["middle"], net(batch.inputs, capture=("middle",)).stages["middle"])
    assert torch.equal(mine.stages["last"], full.stages["last"])
