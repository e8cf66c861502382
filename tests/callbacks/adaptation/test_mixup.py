"""Inter-domain mixup: which rows are blended, and that task loss + term is the mixup objective."""

from __future__ import annotations

import pytest
import torch
from steps import make_task
from torch.nn import functional as F

from crossft.callbacks.adaptation import DomainMixup, InterDomainMixup
from crossft.errors import ConfigError
from crossft.types import Batch, TextSpec

ROLES = ("source", "source", "target")
DOMAINS = torch.tensor([0, 1, 2, 0, -1, 1, 2, 0])
TARGETS = torch.tensor([0, 1, -1, 2, -1, 0, -1, 1])


def batch_of(step: int = 0, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        inputs={"pixel_values": torch.rand(8, 3, 8, 8, generator=generator)},
        targets=TARGETS,
        labeled=TARGETS >= 0,
        domains=DOMAINS,
        sample_ids=torch.arange(8) + 100 * seed,
        quota=(3.0, 2.0, 2.0),
        labeled_quota=5.0,
        step=step,
        keys=("k",) * 8,
    )


def partner_of(old: torch.Tensor, new: torch.Tensor, row: int) -> tuple[int, float]:
    """Find j and lam with new_i = lam old_i + (1 - lam) old_j by least squares."""
    best = None
    for j in range(8):
        if j == row:
            continue
        direction = (old[j] - old[row]).flatten()
        change = (new[row] - old[row]).flatten()
        t = float(change @ direction / (direction @ direction))
        error = float((change - t * direction).norm())
        if best is None or error < best[0]:
            best = (error, j, 1 - t)
    assert best is not None
    assert best[0] < 1e-5
    return best[1], best[2]


@pytest.mark.parametrize("step", range(4))
def test_labeled_source_rows_meet_another_source_domain(step: int) -> None:
    term = InterDomainMixup(alpha=1.0).build(make_task(ROLES))
    batch = batch_of(step)
    new = term.transform(batch)
    old, pixels = batch.inputs["pixel_values"], new.inputs["pixel_values"]
    lams = []
    for i in range(8):
        if DOMAINS[i] in (0, 1):
            j, lam = partner_of(old, pixels, i)
            assert {int(DOMAINS[i]), int(DOMAINS[j])} == {0, 1}
            lams.append(lam)
        else:
            assert torch.equal(pixels[i], old[i])
    assert max(lams) - min(lams) < 1e-5
    assert new.keys == ()  # nothing may be read from a cache by the row's name
    assert torch.equal(new.targets, batch.targets)


def test_task_loss_plus_term_is_the_mixup_objective() -> None:
    task = make_task(ROLES, label_smoothing=0.1)
    term = InterDomainMixup(alpha=1.0).build(task)
    batch = batch_of()
    new = term.transform(batch)
    step = task.model_step(new)
    objective = step.per_sample_loss.sum() / 5 + term(step, task)
    z = step.logits["photo"]
    expected = torch.zeros(())
    for i in (0, 1, 3, 5, 7):
        j, lam = partner_of(batch.inputs["pixel_values"], new.inputs["pixel_values"], i)
        for share, label in ((lam, TARGETS[i]), (1 - lam, TARGETS[j])):
            expected = expected + share * F.cross_entropy(z[[i]], label[None], label_smoothing=0.1) / 5
    assert torch.allclose(objective, expected, atol=1e-5)


def test_draws_depend_on_seed_step_and_rows_alone() -> None:
    def drawn(step: int, seed: int, name: str = "mixup") -> torch.Tensor:
        method = InterDomainMixup(alpha=1.0)
        method.name = name
        term = method.build(make_task(ROLES))
        torch.rand(3)  # the global generator does not matter
        return term.transform(batch_of(step, seed)).inputs["pixel_values"]

    assert torch.equal(drawn(3, 0), drawn(3, 0))
    assert not torch.equal(drawn(3, 0), drawn(4, 0))
    assert not torch.equal(drawn(3, 0), drawn(3, 0, "other"))


def test_without_a_transform_the_term_is_zero() -> None:
    task = make_task(ROLES)
    term = InterDomainMixup().build(task)
    assert term(task.model_step(batch_of()), task) == 0


def test_a_zero_weight_rewrites_nothing_and_two_rewriters_are_refused() -> None:
    task = make_task(ROLES)
    batch = batch_of()
    task.attach("mixup", InterDomainMixup().build(task), 0.0)
    assert task.attachments.transform(batch, 0.0) is batch
    task.attachments.weights["mixup"] = 1.0
    assert task.attachments.transform(batch, 0.0) is not batch
    with pytest.raises(ConfigError, match=r"methods\.more and methods\.mixup both rewrite the batch"):
        task.attach("more", InterDomainMixup().build(task), 1.0)


def test_text_and_bad_settings_are_refused() -> None:
    task = make_task(ROLES)
    task.backbone.input_spec = TextSpec(None, 8)
    with pytest.raises(ConfigError, match="token ids cannot be blended"):
        InterDomainMixup().build(task)
    with pytest.raises(ConfigError, match=r"alpha=0"):
        InterDomainMixup(alpha=0)
    with pytest.raises(ConfigError, match="the run has 1"):
        InterDomainMixup().build(make_task())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_rows_of_one_domain_are_mixed_and_the_objective_is_the_published_one(kind: str) -> None:
    task = make_task(ROLES, label_smoothing=0.1)
    term = DomainMixup(kind=kind, alpha=1.0).build(task)
    batch = batch_of(step=3)
    new = term.transform(batch)
    old, pixels = batch.inputs["pixel_values"], new.inputs["pixel_values"]
    step = task.model_step(new)
    objective = step.per_sample_loss.sum() / 5 + term(step, task)
    z, expected, mixed = step.logits["photo"], torch.zeros(()), 0
    partners = {0: 7, 3: 0, 7: 3, 1: 5, 5: 1}  # the row before it among the labeled rows of its domain
    for i in range(8):
        if i not in partners:
            assert torch.equal(pixels[i], old[i])  # unlabeled, or padding
            continue
        j, share = partners[i], 0.0
        if kind == "mixup":
            found, lam = partner_of(old, pixels, i)
            assert found == j
        else:
            own = (pixels[i] == old[i]).all(0)
            assert ((pixels[i] == old[j]).all(0) | own).all()
            lam = float(own.float().mean())
        mixed += lam < 1
        for share, label in ((lam, TARGETS[i]), (1 - lam, TARGETS[j])):
            expected = expected + share * F.cross_entropy(z[[i]], label[None], label_smoothing=0.1) / 5
    assert mixed
    assert torch.allclose(objective, expected, atol=1e-5)
    assert new.keys == ()


def test_domain_mixup_draws_by_step_leaves_generators_alone_and_names_bad_settings() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        DomainMixup(kind="cutmix", alpha=1.0).build(make_task(ROLES)).transform(batch_of(step)) for step in (3, 3, 4)
    )
    assert torch.equal(first.inputs["pixel_values"], again.inputs["pixel_values"])
    assert not torch.equal(first.inputs["pixel_values"], other.inputs["pixel_values"])
    term = DomainMixup(alpha=1.0).build(make_task(ROLES))
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    term.transform(batch_of())
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ConfigError, match="'blend' is unknown; allowed: mixup, cutmix"):
        DomainMixup(kind="blend")
    with pytest.raises(ConfigError, match="alpha=0"):
        DomainMixup(alpha=0)
    task = make_task(ROLES)
    task.backbone.input_spec = TextSpec(None, 8)
    with pytest.raises(ConfigError, match="token ids cannot be mixed"):
        DomainMixup().build(task)
