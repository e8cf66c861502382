"""The gap is the discrepancy of the features, reads no label, and drives the phases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_gradual import Trace, fit
from tiny import image_domains

from crossft.callbacks.freezing import DomainGap, GradualUnfreezing, Phase
from crossft.data import DomainData
from crossft.data.passes import one_pass, training_rows
from crossft.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_domains(tmp_path_factory.mktemp("gap") / "data", each=16)


class Gaps(Callback):
    """The gap at every validation and the phase that trains then; by hand from all training rows, where asked for."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.by_hand: list[float] = []
        self.phases: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.logged.append(float(trainer.callback_metrics["gap/val/mmd"]))
        self.phases += [c.index for c in trainer.callbacks if isinstance(c, GradualUnfreezing)]
        data = trainer.datamodule
        x, y = (
            torch.cat([pl_module.backbone(b.inputs).features for b in one_pass(data, training_rows(data, role))])
            for role in ("source", "target")
        )
        both = torch.cat([x, y])
        apart = lambda a, b: torch.cdist(a.double(), b.double()).square().sum() / (len(a) * (len(b) - (a is b)))  # noqa: E731
        # for the linear kernel: |mean x - mean y|^2 without the bias of the two variances
        linear = apart(x, y) - apart(x, x) / 2 - apart(y, y) / 2
        self.by_hand.append(float(linear / (2 * both.double().var(0, correction=0).sum())))


def test_the_gap_is_the_distance_of_the_means_and_ends_phases_that_close_it_no_further(root: Path) -> None:
    gaps, trace = Gaps(), Trace()
    method = GradualUnfreezing(every=Phase(patience=1), first=1, monitor="gap/val/mmd", mode="min")
    fit(root, [DomainGap(kernel="linear"), method, gaps, trace], max_epochs=9)
    assert gaps.logged == pytest.approx(gaps.by_hand, rel=1e-3, abs=1e-6)
    assert gaps.logged[0] > 0.05  # the domains differ in brightness
    phase, best, expected = 0, None, []
    for gap in gaps.logged:
        expected.append(phase)
        if best is None or gap < best:
            best = gap
        elif phase < 2:
            phase, best = phase + 1, None
    seen = [trace.phases[i * len(trace.phases) // len(gaps.logged)] for i in range(len(gaps.logged))]
    assert seen == expected
    assert max(seen) == 2


def test_no_label_is_read_and_training_does_not_move(root: Path) -> None:
    values, weights = [], []
    for methods in ([DomainGap(rows=10)], [], [DomainGap(rows=10)]):
        trainer, task = fit(root, list(methods), max_epochs=1)
        values.append(trainer.callback_metrics.get("gap/val/mmd"))
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(values[0], values[2])
    assert torch.equal(weights[0], weights[1])
    data = DomainData(root=root, source="photo", target="sketch", train_on="source", target_labels="none", batch_size=4)
    data.prepare()
    data.bind(task.backbone.input_spec)
    task.eval()
    first = DomainGap(rows=10).measure(task, data)
    data.dataset.targets = list(data.dataset.targets)[::-1]
    assert torch.equal(first, DomainGap(rows=10).measure(task, data))
    assert DomainGap(rows=1000).measure(task, data) > 0


def test_what_cannot_work_is_refused(root: Path) -> None:
    for bad, message in (({"rows": 1}, "rows=1"), ({"kernel": "cubic"}, "'cubic' is unknown; allowed: gaussian")):
        with pytest.raises(ConfigError, match=message):
            DomainGap(**bad)
