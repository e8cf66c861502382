"""What holds for every method: weight 0, label quarantine, save and restore, composition and order."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from adaptation_cases import CASES, SWAD_CASE, data_of, fit
from lightning.pytorch import Callback
from steps import make_step, make_task
from tiny import TinyVision, flat, image_domains, permute_labels

from crossft.callbacks.adaptation import CDAN, CORAL, DANN, MCC, MMD, SWAD
from crossft.callbacks.averaging import EMA
from crossft.callbacks.freezing import GradualUnfreezing, Phase
from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints
from crossft.callbacks.retention import EWC, L2SP
from crossft.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("images"), domains=("photo", "sketch", "art"), each=24)


class AsksFor(Callback):
    """Asks for the rows that a method asks for, and does nothing else: its run has the same mixed batches."""

    def __init__(self, method: Callback) -> None:
        self.method = method

    def setup(self, trainer, pl_module, stage) -> None:
        for role, need in (("source", self.method.needs_source), ("target", self.method.needs_target)):
            if need != "none":
                trainer.datamodule.include(role, labels=need == "labeled")


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    """Runs without a method, by the rows that the method asks for."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_weight_zero_is_the_run_without_it(root: Path, plain_runs: dict, name: str) -> None:
    case = CASES[name]
    method = case.make(1.0)
    key = (case.sources, method.needs_source, method.needs_target)
    if key not in plain_runs:
        plain_runs[key] = fit(data_of(root, case.sources), {}, dropout=0.2, extra=(AsksFor(method),))[1]
    plain = plain_runs[key]
    off = fit(data_of(root, case.sources), {name: case.make(0.0)}, dropout=0.2)[1]
    on = fit(data_of(root, case.sources), {name: case.make(case.weight)}, dropout=0.2)[1]
    assert torch.equal(flat(off), flat(plain))
    assert (flat(on) - flat(plain)).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*CASES, "swad"])
def test_a_restored_run_ends_at_the_same_bits(root: Path, tmp_path: Path, name: str) -> None:
    case = SWAD_CASE if name == "swad" else CASES[name]
    at, more = 2, {}
    if name == "swad":  # resumed between two validations
        at, more = 3, {"limit_val_batches": 1.0, "val_check_interval": 2}

    def run(ckpt: Path | None = None):
        methods = {name: case.make(case.weight)}
        saves = Checkpoints(tmp_path, every_minutes=None, every_n_steps=at, keep=9)
        writes = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, **more}
        data = data_of(root, case.sources)
        return fit(data, methods, dropout=0.2, ckpt_path=ckpt, extra=(saves,), **writes)[1]

    whole = run()
    again = run(tmp_path / "checkpoints" / f"step-{at}.ckpt")
    assert torch.equal(flat(again), flat(whole))
    for a, b in zip(whole.attachments.state_dict().values(), again.attachments.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_permuting_the_labels_of_the_target_changes_no_bit(root: Path, tmp_path: Path) -> None:
    """All methods that read the target at once: files move between class folders, the content stays."""
    ends = []
    for folder in (root, permute_labels(root, tmp_path / "permuted")):
        methods = {n: c.make(0.1 * c.weight) for n, c in CASES.items() if not c.sources}
        ends.append(flat(fit(data_of(folder, False), methods)[1]))
    assert torch.equal(*ends)
    assert torch.isfinite(ends[0]).all()


@pytest.mark.parametrize("sources", [True, False])
def test_no_method_reseeds_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch, sources: bool) -> None:
    """Its weights and its draws come from a generator of their own, so dropout on a GPU is that without it."""
    seeds: list[list[int]] = []
    for names in ([], [n for n, c in CASES.items() if c.sources == sources]):
        seeds.append([])
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds[-1].append)
        fit(data_of(root, sources), {n: CASES[n].make(0.0) for n in names})
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("name", ["bsp", "mmd", "jan", "coral", "cmd", "mcc", "bnm", "hafn", "irm", "fishr"])
def test_statistics_of_a_batch_are_taken_in_full_precision(name: str) -> None:
    """Under autocast too: features and logits of a bfloat16 run give the value that float32 gives for them."""
    case = CASES[name]
    roles = ("source", "source") if case.sources else ("source", "target")
    task = make_task(roles)
    term = case.make(1.0).build(task)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(16, d, generator=generator).bfloat16().float() for d in (12, 3))
    z.requires_grad_()

    def value() -> float:
        step = make_step(x + 3, [0, 1] * 8, roles, logits=z, targets=[0, 1, 2, 0] * 4, progress=1.0)
        return float(term(replace(step, stages={"middle": x}), task).detach())

    expected = value()
    with torch.autocast("cpu", torch.bfloat16):
        assert value() == pytest.approx(expected, rel=1e-5)


THREE = {
    "dann": lambda: DANN(hidden=8),
    "cdan": lambda: CDAN(hidden=8),
    "mmd": lambda: MMD(),
    "coral": lambda: CORAL(),
    "mcc": lambda: MCC(),
}


PARTNERS = {
    "gradual": lambda: GradualUnfreezing(every=Phase(steps=1), first=2),
    "ewc": lambda: EWC(weight=1.0),
    "l2sp": lambda: L2SP(),
}


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("names", list(combinations(THREE, 3)), ids="-".join)
def test_any_three_run_together_beside_freezing_or_forgetting(root: Path, names, partner: str) -> None:
    """In any order of the methods the bits are the same."""

    def run(chosen: tuple[str, ...]) -> torch.Tensor:
        methods = {n: (THREE | PARTNERS)[n]() for n in chosen}
        return flat(fit(data_of(root, False), methods, max_steps=2)[1])

    whole = run((*names, partner))
    assert torch.isfinite(whole).all()
    assert torch.equal(run((partner, *reversed(names))), whole)


@pytest.mark.parametrize("name", CASES)
def test_two_of_one_class_stay_apart(name: str) -> None:
    one, two = CASES[name].make(1.0), CASES[name].make(2.0)
    one.name, two.name = "one", "two"
    assert one.state_key != two.state_key


def test_swad_makes_the_average_the_model(root: Path) -> None:
    """Over a valley that holds every step, the model at the end is the mean of the weights after each step."""
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            seen.append(torch.cat([p.detach().double().flatten() for p in pl_module.parameters()]))

    swad = {"swad": SWAD_CASE.make(1.0)}
    more = {"limit_val_batches": 1.0, "val_check_interval": 1}
    task = fit(data_of(root, True), swad, extra=(Watch(),), **more)[1]
    end = torch.cat([p.detach().double().flatten() for p in task.parameters()])
    assert torch.allclose(end, torch.stack(seen).mean(0), atol=1e-6)
    assert not torch.allclose(end, seen[-1], atol=1e-4)


def test_swad_refuses_what_it_cannot_average(root: Path) -> None:
    more = {"limit_val_batches": 1.0, "val_check_interval": 1}
    with pytest.raises(ConfigError, match=r"needs \['nowhere/val/loss'\]; validation measures art/val/accuracy"):
        fit(data_of(root, True), {"swad": SWAD(monitor="nowhere/val/loss")}, **more)
    with pytest.raises(ConfigError, match=r"methods\.swad and methods\.ema both choose the weights"):
        fit(data_of(root, True), {"swad": SWAD(), "ema": EMA()}, **more)
    with pytest.raises(ConfigError, match=r"set model\.batchnorm=frozen"):
        fit(data_of(root, True), {"swad": SWAD()}, backbone=TinyVision(batchnorm=True, pretrained=False), **more)
