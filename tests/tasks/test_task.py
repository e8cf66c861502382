"""The task's own arithmetic, on batches made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import TinyVision
from torch import Tensor
from torch.nn import functional as F

from crossft.errors import ConfigError, StageError
from crossft.tasks import Classification, Regression
from crossft.tasks.evaluation import display_names
from crossft.types import Batch, Domain, LossTerm, StepOutput

SAME = [Domain("photo", "source", labels=("a", "b", "c")), Domain("sketch", "target", labels=("a", "b", "c"))]
APART = [Domain("photo", "source", labels=("a", "b", "c", "d")), Domain("sketch", "target", labels=("x", "y"))]


def make_batch(targets: Tensor, domains: list[int], labeled: list[bool]) -> Batch:
    n = len(domains)
    torch.manual_seed(3)
    return Batch(
        inputs={"pixel_values": torch.randn(n, 3, 8, 8)},
        targets=targets,
        labeled=torch.tensor(labeled),
        domains=torch.tensor(domains),
        sample_ids=torch.arange(n),
        quota=(2.0, 2.0),
        labeled_quota=float(sum(labeled)) or 1.0,
    )


def losses(task, batch: Batch) -> StepOutput:
    task.eval()
    return task.model_step(batch)


def test_loss_of_labeled_rows_only() -> None:
    task = Classification(TinyVision(), SAME)
    batch = make_batch(torch.tensor([0, 2, -1, 1]), [0, 1, 1, -1], [True, True, False, False])
    step = losses(task, batch)
    expected = F.cross_entropy(step.logits["photo"][:2], torch.tensor([0, 2]), reduction="none")
    assert torch.allclose(step.per_sample_loss, torch.cat([expected, torch.zeros(2)]))


def test_each_row_is_scored_by_the_head_of_its_own_label_space() -> None:
    task = Classification(TinyVision(), APART)
    batch = make_batch(torch.tensor([3, 1, 0, -1]), [0, 1, 1, 1], [True, True, True, False])
    step = losses(task, batch)
    assert {k: v.shape[1] for k, v in step.logits.items()} == {"photo": 4, "sketch": 2}
    expected = torch.stack(
        [
            F.cross_entropy(step.logits["photo"][0], torch.tensor(3)),
            F.cross_entropy(step.logits["sketch"][1], torch.tensor(1)),
            F.cross_entropy(step.logits["sketch"][2], torch.tensor(0)),
            torch.zeros(()),
        ]
    )
    assert torch.allclose(step.per_sample_loss, expected)


def test_class_weights_and_smoothing_equal_torch() -> None:
    weights = [0.5, 1.0, 2.0]
    batch = make_batch(torch.tensor([0, 1, 2, 2]), [0, 1, 1, 0], [True] * 4)
    task = Classification(TinyVision(), SAME, class_weights=weights)
    step = losses(task, batch)
    expected = F.cross_entropy(step.logits["photo"], batch.targets, torch.tensor(weights), reduction="none")
    assert torch.allclose(step.per_sample_loss, expected)
    smooth = Classification(TinyVision(), SAME, label_smoothing=0.2)
    step = losses(smooth, batch)
    expected = F.cross_entropy(step.logits["photo"], batch.targets, reduction="none", label_smoothing=0.2)
    assert torch.allclose(step.per_sample_loss, expected)


def test_class_weights_are_those_of_the_targets_label_space() -> None:
    """A source of another size, and one of as many classes with other names, is not weighted."""
    target = Domain("sketch", "target", labels=("x", "y", "z"))
    for labels in (("a", "b"), ("a", "b", "c")):
        task = Classification(
            TinyVision(), [Domain("photo", "source", labels=labels), target], class_weights=[1.0, 2.0, 3.0]
        )
        step = losses(task, make_batch(torch.tensor([1, 1, 2, 0]), [0, 1, 1, 1], [True] * 4))
        plain = F.cross_entropy(step.logits["photo"][:1], torch.tensor([1]), reduction="none")
        weighted = F.cross_entropy(
            step.logits["sketch"][1:], torch.tensor([1, 2, 0]), torch.tensor([1.0, 2.0, 3.0]), reduction="none"
        )
        assert torch.allclose(step.per_sample_loss, torch.cat([plain, weighted]))


def test_balanced_weights_are_counted_by_label_space() -> None:
    domains = [*SAME, Domain("toy", "target", labels=("x", "y", "z"))]
    task = Classification(TinyVision(), domains, class_weights="balanced")
    counts = {"photo": [1, 2, 3], "sketch": [5, 0, 1], "toy": [2, 0, 6]}
    data = SimpleNamespace(training_domains=tuple(counts), class_counts=lambda name: counts[name])
    task.trainer = SimpleNamespace(datamodule=data)
    task.setup("fit")
    assert torch.allclose(task.get_buffer("_weights_photo"), torch.tensor([12 / 18, 12 / 6, 12 / 12]))
    assert torch.allclose(task.get_buffer("_weights_toy"), torch.tensor([8 / 6, 0.0, 8 / 18]))
    assert not [k for k in task.state_dict() if "weights" in k]


def test_class_weights_of_labels_that_do_not_train_are_refused() -> None:
    task = Classification(TinyVision(), APART, class_weights=[1.0, 2.0])
    task.trainer = SimpleNamespace(datamodule=SimpleNamespace(training_domains=("photo",)))
    with pytest.raises(ConfigError, match=r"class_weights=\[1.0, 2.0\] are for the classes of domain 'sketch'"):
        task.setup("fit")


def test_multilabel_loss_and_blank_targets() -> None:
    domains = [Domain("photo", "source", "multilabel", ("a", "b"))]
    task = Classification(TinyVision(), domains)
    targets = torch.tensor([[1.0, 0.0], [float("nan")] * 2])
    step = losses(task, make_batch(targets, [0, 0], [True, False]))
    expected = F.binary_cross_entropy_with_logits(step.logits["photo"][0], targets[0])
    assert torch.allclose(step.per_sample_loss, torch.stack([expected, torch.zeros(())]))
    step.per_sample_loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


@pytest.mark.parametrize(
    "kinds", [("multilabel", "multilabel"), ("multilabel", "multiclass"), ("multiclass", "multilabel")]
)
def test_label_spaces_of_different_forms_stay_apart(kinds: tuple[str, str]) -> None:
    """A batch of target rows passes by a source head whose targets have another form, and is scored by its own."""
    source, target = (
        Domain("photo", "source", kinds[0], ("a", "b", "c")),
        Domain("sketch", "target", kinds[1], ("x", "y")),
    )
    task = Classification(TinyVision(), [source, target])
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) if kinds[1] == "multilabel" else torch.tensor([1, 0])
    step = losses(task, make_batch(targets, [1, 1], [True, True]))
    own = step.logits["sketch"]
    if kinds[1] == "multilabel":
        expected = F.binary_cross_entropy_with_logits(own, targets, reduction="none").mean(1)
        assert torch.allclose(task.predictions(own, target), own.sigmoid())
    else:
        expected = F.cross_entropy(own, targets, reduction="none")
        assert torch.allclose(task.predictions(own, target), own.softmax(1))
    assert torch.allclose(step.per_sample_loss, expected)


def test_regression_in_standard_units_predicts_in_label_units() -> None:
    task = Regression(TinyVision(), [Domain("photo", "source", "regression", ("age",))])
    task.label_mean.fill_(50.0)
    task.label_scale.fill_(10.0)
    step = losses(task, make_batch(torch.tensor([60.0, float("nan")]), [0, 0], [True, False]))
    assert torch.allclose(step.per_sample_loss[0], (step.logits["photo"][0, 0] - 1.0) ** 2)
    assert step.per_sample_loss[1] == 0
    assert torch.allclose(task.predictions(step.logits["photo"], task.domains[0]), step.logits["photo"][:, 0] * 10 + 50)


def test_frozen_stages_stay_in_evaluation_mode_and_lose_their_gradient() -> None:
    task = Classification(TinyVision(dropout=0.5, batchnorm=True), SAME, batchnorm="training")
    batch = make_batch(torch.tensor([0, 1]), [0, 1], [True, True])
    task.train().model_step(batch).per_sample_loss.sum().backward()
    task.train_stages(["last"])
    task.eval()
    task.train()
    assert task.frozen_stages == {"stem", "middle"}
    assert not task.backbone.middle.training
    assert task.backbone.last.training
    assert all(p.grad is None for p in task.backbone.middle.parameters())
    before = task.backbone.middle[1].running_mean.clone()
    first, second = (task.model_step(batch).features for _ in range(2))
    assert torch.equal(first, second)  # dropout and batch statistics are off below the cut
    assert torch.equal(task.backbone.middle[1].running_mean, before)


def test_unknown_stage_is_named() -> None:
    with pytest.raises(StageError, match=r"'blocks\.9'.*stem, middle, last"):
        Classification(TinyVision(), SAME).train_stages(["blocks.9"])


@pytest.mark.parametrize(
    ("pretrained", "policy", "moves"), [(True, "auto", False), (False, "auto", True), (True, "training", True)]
)
def test_batchnorm_policy_is_about_statistics_only(pretrained: bool, policy: str, moves: bool) -> None:
    task = Classification(TinyVision(batchnorm=True, pretrained=pretrained), SAME, batchnorm=policy).train()
    layer = task.backbone.middle[1]
    before = layer.running_mean.clone()
    step = task.model_step(make_batch(torch.tensor([0, 1, 2]), [0, 1, 1], [True] * 3))
    step.per_sample_loss.sum().backward()
    assert (not torch.equal(layer.running_mean, before)) == moves
    assert layer.weight.grad is not None


class Count(LossTerm):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, step: StepOutput, model) -> Tensor:
        return self.scale * step.features.square().mean()


def test_state_dict_is_backbone_and_heads_only_and_loads_strictly() -> None:
    task = Classification(TinyVision(), SAME)
    keys = set(task.state_dict())
    task.attach("count", Count(), 1.0)
    assert set(task.state_dict()) == keys
    task.load_state_dict(Classification(TinyVision(), SAME).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        task.load_state_dict({k: v for k, v in task.state_dict().items() if "stem" not in k})


def test_terms_are_weighted_by_the_task_alone_and_sum_in_name_order() -> None:
    task = Classification(TinyVision(), SAME)
    task.attach("b", Count(), 2.0)
    task.attach("a", Count(), lambda progress: 10 * progress)
    step = losses(task, make_batch(torch.tensor([0, 1]), [0, 1], [True, True]))
    step.progress = 0.5
    total, values = task.attachments.add_terms(torch.zeros(()), step, task)
    assert list(values) == ["a", "b"]
    assert torch.allclose(total, 5 * values["a"] + 2 * values["b"])


def test_a_name_is_attached_once() -> None:
    task = Classification(TinyVision(), SAME)
    task.attach("count", Count(), 1.0)
    with pytest.raises(ConfigError, match=r"methods\.count is attached twice"):
        task.attach("count", Count(), 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(TinyVision(), []), "domains="),
        (lambda: Classification(TinyVision(), SAME, label_smoothing=1.0), "label_smoothing=1.0"),
        (
            lambda: Classification(TinyVision(), SAME, class_weights=[1.0, 2.0]),
            r"class_weights=\[1.0, 2.0\] must .* 3 classes of domain 'sketch', in their order: a, b, c; .*source_leg",
        ),
        (lambda: Classification(TinyVision(), SAME, class_weights=[1.0, -1.0, 1.0]), "one non-negative number"),
        (lambda: Classification(TinyVision(), [Domain("p", "source", "regression", ("y",))]), "Regression"),
        (lambda: Regression(TinyVision(), SAME), "Classification"),
        (lambda: Classification(TinyVision(), SAME, batchnorm="sometimes"), "batchnorm='sometimes'"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_fit_without_an_end_is_refused() -> None:
    task = Classification(TinyVision(), SAME)
    endless = SimpleNamespace(precision_plugin=None, estimated_stepping_batches=float("inf"))
    task.trainer = endless
    with pytest.raises(ConfigError, match="never ends, and schedules need an end"):
        task.configure_optimizers()


def test_display_names_are_roles_where_one_domain_has_it() -> None:
    several = [Domain("a", "source"), Domain("b", "source"), Domain("c", "target"), Domain("d", "eval")]
    assert display_names(several) == {"a": "a", "b": "b", "c": "target", "d": "d"}
