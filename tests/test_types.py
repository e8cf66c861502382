import pytest
import torch
from torch import Tensor, nn

import crossft.types
from crossft.types import Batch, Domain, Stage, StepOutput, head_of


def batch(**kwargs) -> Batch:
    defaults = {
        "inputs": {"pixel_values": torch.zeros(4, 1)},
        "targets": torch.zeros(4, dtype=torch.long),
        "labeled": torch.tensor([True, True, False, False]),
        "domains": torch.tensor([0, 0, 1, -1]),
        "sample_ids": torch.arange(4),
        "quota": (2.0, 1.0),
        "labeled_quota": 2.0,
        "step": 3,
    }
    return Batch(**{**defaults, **kwargs})


def step(b: Batch) -> StepOutput:
    return StepOutput(b, torch.zeros(4, 2), {}, torch.zeros(4), 0.0, roles=("source", "target"))


def test_move_returns_a_new_batch_and_keeps_plain_values() -> None:
    old = batch()
    new = old.to("meta")
    assert new is not old
    assert {t.device.type for t in (*new.inputs.values(), new.targets, new.labeled, new.domains, new.sample_ids)} == {
        "meta"
    }
    assert (new.quota, new.labeled_quota, new.step) == (old.quota, old.labeled_quota, old.step)
    assert old.targets.device.type == "cpu"


def test_lightning_moves_a_batch() -> None:
    from lightning.pytorch.utilities import move_data_to_device

    assert move_data_to_device(batch(), torch.device("meta")).domains.device.type == "meta"


class Pinnable:
    """Stands for a tensor: pinning a real one needs an accelerator."""

    def __init__(self) -> None:
        self.pinned = False

    def pin_memory(self) -> "Pinnable":
        new = Pinnable()
        new.pinned = True
        return new


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning moves a batch without saying so, and a pinned one would be copied while the host stands still."""
    asked: list[bool] = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append(non_blocking) or self)
    old = batch()
    old.to("cuda:0")
    assert set(asked) == {True}
    asked.clear()
    old.to("meta")
    assert set(asked) == {False}


def test_torch_pins_a_batch() -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    tensors = {name: Pinnable() for name in ("targets", "labeled", "domains", "sample_ids")}
    old = batch(inputs={"pixel_values": Pinnable()}, **tensors)
    new = pin_memory(old)
    assert isinstance(new, Batch)
    assert new is not old
    assert all(t.pinned for t in (new.targets, new.labeled, new.domains, new.sample_ids, *new.inputs.values()))
    assert (new.quota, new.step) == (old.quota, old.step)


def test_mean_divides_by_the_quota_not_by_the_rows_present() -> None:
    """Two micro-batches with 3 and 1 rows of a domain, quota 2: the average of their means is the mean of 4 rows."""
    values = torch.tensor([1.0, 2.0, 6.0, 100.0])
    first = step(batch(domains=torch.tensor([0, 0, 0, -1]), quota=(2.0, 0.0)))
    second = step(batch(domains=torch.tensor([0, 1, 1, -1]), quota=(2.0, 0.0)))
    assert (first.mean(values, (0,)) + second.mean(values, (0,))) / 2 == (1 + 2 + 6 + 1) / 4


def test_padding_rows_are_in_no_domain() -> None:
    s = step(batch())
    assert s.rows((0, 1)).tolist() == [True, True, True, False]
    assert s.ids("source") == (0,)
    assert s.ids("eval") == ()


def test_heads_are_keyed_by_label_space() -> None:
    domains = [
        Domain("sketch", "target", labels=("cat", "dog")),
        Domain("photo", "source", labels=("cat", "dog")),
        Domain("xray", "eval", labels=("ill", "well")),
        Domain("age", "eval", kind="regression", labels=("age",)),
    ]
    assert head_of(domains) == {"photo": "photo", "sketch": "photo", "xray": "xray", "age": "age"}


def test_stage_lists_each_parameter_once() -> None:
    shared = nn.Linear(2, 2)
    stage = Stage("s", (nn.Sequential(shared, shared),), extra=(shared.weight,))
    assert [id(p) for p in stage.parameters()] == [id(shared.weight), id(shared.bias)]


def test_all_names_exist() -> None:
    assert all(hasattr(crossft.types, name) for name in crossft.types.__all__)
