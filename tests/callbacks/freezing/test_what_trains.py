"""The task finds out, at every moment it should, that what trains is no longer what was set: with any strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_gradual import fit
from tiny import TinyVision, image_domains

from crossft.backbones import Adapted
from crossft.callbacks.freezing import Freeze, GradualUnfreezing, Phase
from crossft.errors import TrainingError

STRATEGIES: dict[str, Callable[[], list[Callback]]] = {
    "everything": list,
    "adapters": list,
    "freeze": lambda: [Freeze(train_last=1)],
    "phases": lambda: [GradualUnfreezing([Phase(train_last=1, epochs=2), Phase()])],
}


class Break(Callback):
    """Do something to a run at the end of a step or a validation, or when the fit starts."""

    def __init__(self, moment: str, harm: Callable) -> None:
        self.moment, self.harm = moment, harm

    def _at(self, moment: str, trainer, task) -> None:
        if moment == self.moment:
            self.harm(task, trainer.optimizers[0])

    def on_train_start(self, trainer, pl_module) -> None:
        self._at("start", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._at("step", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._at("validation", trainer, pl_module)


def last_weight(task) -> torch.nn.Parameter:
    return next(p for n, p in task.backbone.named_parameters() if "last.0" in n and n.endswith("weight"))


def decays(task, optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def drops(task, optimizer) -> None:
    del optimizer.param_groups[-1]


def freezes(task, optimizer) -> None:
    last_weight(task).requires_grad_(not last_weight(task).requires_grad)


def starts_dropout(task, optimizer) -> None:
    task.backbone.train()


def writes_statistics(task, optimizer) -> None:
    next(b for n, b in task.backbone.named_buffers() if n.endswith("running_mean")).add_(1.0)


HARMS = [
    (decays, r"weight_decay=0\.5 in the optimizer, against 0\.01"),
    (drops, r"'heads\.photo\.1\.(weight|bias)' is in no group of the optimizer"),
    (freezes, r"last\.0.*weight' (trains|is frozen), against what was set"),
    (starts_dropout, "'stem' is frozen but in training mode"),
    (writes_statistics, "'middle' is frozen but its buffers have changed"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("checks") / "data", each=16)


def run(root: Path, strategy: str, *others: Callback, **options) -> None:
    net = TinyVision(dropout=0.3, batchnorm=True)
    backbone = Adapted(net, rank=2, stages=["last"]) if strategy == "adapters" else net
    fit(root, [*STRATEGIES[strategy](), *others], backbone=backbone, **options)


CASES = [(s, *h) for s in STRATEGIES for h in (HARMS if s != "everything" else HARMS[:3])]  # nothing is frozen there


@pytest.mark.parametrize(("strategy", "harm", "message"), CASES, ids=[f"{s}-{h.__name__}" for s, h, _ in CASES])
def test_what_changes_is_found_after_the_next_validation(root: Path, strategy: str, harm, message: str) -> None:
    moment = "step" if harm in (starts_dropout, writes_statistics) else "validation"  # which brings modes back
    with pytest.raises(TrainingError, match=message):
        run(root, strategy, Break(moment, harm), max_epochs=3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_changes_is_found_when_a_fit_starts_and_when_it_is_resumed(root: Path, strategy: str, tmp_path) -> None:
    with pytest.raises(TrainingError, match="in no group"):
        run(root, strategy, Break("start", drops))
    run(root, strategy, folder=tmp_path, max_epochs=3)
    with pytest.raises(TrainingError, match=r"weight_decay=0\.5"):
        run(root, strategy, Break("start", decays), resume=next(tmp_path.glob("*/step-2.ckpt")), max_epochs=3)


def test_what_changes_is_found_at_a_phase_change_without_any_validation(root: Path) -> None:
    plan = [Phase(train_last=1, steps=2), Phase(train_last=0, steps=2), Phase()]
    for harm, message in ((decays, "weight_decay"), (writes_statistics, "'middle' is frozen but its buffers")):
        with pytest.raises(TrainingError, match=message):
            run(root, "everything", GradualUnfreezing(plan), Break("step", harm), limit_val_batches=0)


def test_a_fit_trains_in_training_mode_whatever_was_before(root: Path) -> None:
    """TRAP 6: Lightning keeps the modes that it finds, so a task that was evaluated would train without dropout."""

    class Evaluated(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            pl_module.eval()

    net, seen = TinyVision(dropout=0.3), []
    look = Break("step", lambda task, optimizer: seen.append({n for n, m in net.named_children() if m.training}))
    fit(root, [Evaluated(), Freeze(train_last=2), look], backbone=net, max_epochs=2)
    assert seen == [{"middle", "last"}] * len(seen)


def test_two_methods_that_choose_are_refused_in_either_order(root: Path) -> None:
    methods = [Freeze(train_last=1), GradualUnfreezing(every=Phase(epochs=1))]
    for order in (methods, methods[::-1]):
        with pytest.raises(TrainingError, match="second method"):
            run(root, "everything", *order)


def test_reestimation_replaces_frozen_statistics_but_for_training(root: Path) -> None:
    """AdaBN is asked for by name, so it is the one that writes buffers of frozen stages: between the steps."""
    means: list[torch.Tensor] = []
    look = Break("step", lambda task, optimizer: means.append(task.backbone.middle[1].running_mean.clone()))
    net = TinyVision(batchnorm=True)
    _, task = fit(root, [Freeze(train_last=1), look], backbone=net, batchnorm="reestimated", max_epochs=2)
    assert task.frozen_stages == {"stem", "middle"}
    assert all(torch.equal(mean, torch.zeros(12)) for mean in means)
    assert not torch.equal(net.middle[1].running_mean, means[0])
