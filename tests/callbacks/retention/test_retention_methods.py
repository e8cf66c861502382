"""What holds for every method: weight 0, label quarantine, save and restore, composition."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from retention_cases import CASES, data_of, fit, images, recalling
from tiny import flat

from crossft.callbacks.monitoring import AtomicCheckpointIO, Checkpoints
from crossft.callbacks.retention import Replay
from crossft.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def weights(task) -> torch.Tensor:
    return flat(task.backbone)


def same_batches(name: str) -> dict[str, Callback]:
    """What brings the batches of a method, and does nothing else."""
    return {name: Replay(size=9)} if name == "der" else {}


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.off and n != "der-unlabeled"])
def test_weight_zero_is_the_run_without_it(root: Path, name: str) -> None:
    case = CASES[name]

    def end(methods: dict[str, Callback]) -> torch.Tensor:
        return flat(fit(data_of(root, target=case.target), methods, dropout=0.2)[1])

    plain = end(same_batches(name))
    assert torch.equal(end({name: case.make(0.0)}), plain)
    assert (end({name: case.make(case.weight)}) - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.off and n != "si"])
def test_it_does_something(root: Path, name: str) -> None:
    """A first leg of SI only records: see test_si.py."""
    case = CASES[name]
    make = {"batchnorm": case.batchnorm}
    plain = fit(data_of(root, target=case.target), {}, **make)[1]
    on = fit(data_of(root, target=case.target), {name: case.make(case.weight)}, **make)[1]
    assert (flat(on) - flat(plain)).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*CASES, "recadam"])
def test_a_restored_run_ends_at_the_same_bits(root: Path, tmp_path: Path, name: str) -> None:
    case = CASES.get(name)

    def run(ckpt: Path | None = None):
        methods = {} if case is None else {name: case.make(case.weight)}
        saves = Checkpoints(tmp_path, every_minutes=None, every_n_steps=2, keep=9)
        return fit(
            data_of(root, target=case.target if case else "sketch"),
            methods,
            dropout=0.2,
            batchnorm=bool(case and case.batchnorm),
            optimizer=None if case else recalling,
            ckpt_path=ckpt,
            extra=(saves,),
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=True,
        )[1]

    whole = run()
    published = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    again = run(tmp_path / "checkpoints" / "step-2.ckpt")
    assert torch.equal(flat(again), flat(whole))
    assert all(torch.equal(v, published[k]) for k, v in whole.state_dict().items())
    for a, b in zip(whole.attachments.state_dict().values(), again.attachments.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # provenance is plain


UNLABELED = [n for n, c in CASES.items() if c.target == "sketch" and n not in ("delta", "stochnorm", "swa", "wiseft")]


def test_permuting_the_labels_of_an_unlabeled_target_changes_no_bit(root: Path, tmp_path: Path) -> None:
    """Most methods at once, source labels and target inputs in every batch; files move between class folders."""
    shutil.copytree(root, tmp_path / "permuted")
    target = tmp_path / "permuted" / "sketch"
    for i, path in enumerate(sorted(target.glob("*/*.png"))):
        path.rename(target / ("dog", "cat")[i % 2] / f"moved-{i:03d}.png")
    ends = []
    for folder in (root, tmp_path / "permuted"):
        methods = {n: CASES[n].make(0.01 * CASES[n].weight) for n in UNLABELED if not n.startswith(("replay-", "der"))}
        data = data_of(folder, train_on=["source", "target"], target_labels="none")
        ends.append(flat(fit(data, methods)[1]))
    assert torch.equal(*ends)
    assert torch.isfinite(ends[0]).all()


def test_three_penalties_and_a_term_run_together_and_each_counts(root: Path) -> None:
    names = ["agem", "drift", "ewc", "lwf", "mas", "mixout"]

    def end(chosen: list[str]) -> torch.Tensor:
        return flat(fit(data_of(root, target="flipped"), {n: CASES[n].make(CASES[n].weight) for n in chosen})[1])

    together = end(names)
    assert torch.equal(end(list(reversed(names))), together)
    for missing in names:
        assert not torch.equal(end([n for n in names if n != missing]), together)


@pytest.mark.parametrize("name", CASES)
def test_two_of_one_class_stay_apart(name: str) -> None:
    one, two = CASES[name].make(CASES[name].weight), CASES[name].make(CASES[name].weight)
    one.name, two.name = "one", "two"
    assert one.state_key != two.state_key


@pytest.mark.parametrize("name", ["ewc", "mas", "agem", "replay", "der", "lwf"])
def test_what_needs_a_source_refuses_a_run_without_one(root: Path, name: str) -> None:
    data = data_of(root, source=None)
    with pytest.raises(ConfigError, match=r"set data\.source"):
        fit(data, {name: CASES[name].make(1.0)})


@pytest.mark.parametrize("name", ["ewc-empirical", "agem", "replay", "der"])
def test_what_needs_source_labels_refuses_a_source_without(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="labeled training rows"):
        fit(data_of(root, source_labels="none"), {name: CASES[name].make(1.0)})


@pytest.mark.parametrize("name", ["lwf", "features", "bss", "r3f", "delta-uniform"])
def test_what_works_on_target_rows_refuses_batches_without(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no training batch holds one"):
        fit(data_of(root, train_on="source"), {name: CASES[name].make(1.0)})
