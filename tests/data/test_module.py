from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import image_domains, text_domains
from torch import Tensor

from crossft.callbacks.monitoring import Stopping
from crossft.data import DomainData, dataset
from crossft.errors import ConfigError, DataError, Interrupted, SplitError
from crossft.types import Batch, TextSpec


@pytest.fixture
def images(tmp_path) -> Path:
    return image_domains(tmp_path / "images", classes=("cat", "dog", "owl"), each=20)


@pytest.fixture
def texts(tmp_path) -> Path:
    return text_domains(tmp_path / "texts", each=40)


def both(root: Path, spec, **kw) -> DomainData:
    first, second = ("books", "kitchen") if isinstance(spec, TextSpec) else ("photo", "sketch")
    data = DomainData(root, first, second, train_on=["source", "target"], **{"batch_size": 8, **kw})
    data.bind(spec)
    return data


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.inputs.values(), batch.targets, batch.labeled, batch.domains, batch.sample_ids]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert (a.quota, a.labeled_quota, a.step) == (b.quota, b.labeled_quota, b.step)
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(tensors(a), tensors(b)))


@pytest.mark.parametrize("kind", ["image", "text"])
def test_batches_do_not_depend_on_workers_and_leave_the_global_generators_alone(kind, request, images, texts):
    spec, root = request.getfixturevalue(f"{kind}_spec"), images if kind == "image" else texts
    options = {"augment": "randaugment"} if kind == "image" else {"length_window": 2}
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    single = both(root, spec, **options).train_dataloader()
    epochs = [list(single), list(single)]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    many = both(root, spec, num_workers=2, cache_images=False, **options).train_dataloader()
    for epoch in epochs:
        assert_equal(epoch, list(many))
    assert not torch.equal(epochs[0][0].sample_ids, epochs[1][0].sample_ids)


def test_augmentation_follows_seed_and_draw(images, image_spec):
    def pixels(**kw) -> dict[tuple[int, int], Tensor]:
        loader = both(images, image_spec, **kw).train_dataloader()
        rows = [(e, b, i) for e in (0, 1) for b in loader for i in range(len(b)) if b.domains[i] == 0]
        return {(e, int(b.sample_ids[i])): b.inputs["pixel_values"][i] for e, b, i in rows}

    first = pixels()
    assert all(torch.equal(v, first[k]) for k, v in pixels(cache_images=False).items())
    same = [torch.equal(first[0, i], first[1, i]) for e, i in first if e == 0]
    assert sum(same) < len(same) / 4, "another pass, another crop"
    plain = pixels(augment="none")
    assert all(torch.equal(plain[0, i], plain[1, i]) for e, i in plain if e == 0)


def test_images_that_nothing_augments_are_made_once_where_all_fit(images, image_spec, monkeypatch) -> None:
    monkeypatch.setattr("crossft.data.module.CACHE_BYTES", 100_000)

    def passes(size: int, augment: str = "none", **kw) -> tuple[list[Tensor], list[Any], Any]:
        data = both(images, replace(image_spec, size=(size, size)), augment=augment, **kw)
        made, make = [], data.dataset.evaluate
        data.dataset.evaluate = lambda image: made.append(np.asarray(image).tobytes()) or make(image)
        loader = data.train_dataloader()
        return [b.inputs["pixel_values"] for _ in range(2) for b in loader], made, data.dataset.cache

    for size, once in ((4, True), (64, False)):  # 120 images of 8 x 8: 23 kB decoded; ready 23 kB, and 5.9 MB
        expected, many, _ = passes(size, cache_images=False)
        found, made, cache = passes(size)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(made) == (len(cache.inputs) if once else len(many))
        assert len(cache.inputs if once else cache.images) > 60
        held = sum(x.nbytes for x in cache.images.values()) + sum(4 * x.numel() for x in cache.inputs.values())
        assert cache.left == 100_000 - held
    assert not passes(4, "light")[2].inputs, "an augmented run keeps what it augments"


def test_a_batch_states_exact_quotas_and_labels(images, image_spec):
    data = both(images, image_spec, batch_size=6, mix={"source": 2, "target": 1}, target_labels="none")
    names = [d.name for d in data.domains]
    for batch in data.train_dataloader():
        counts = [int((batch.domains == i).sum()) for i in range(2)]
        assert tuple(map(float, counts)) == batch.quota
        assert batch.labeled_quota == counts[0] == int(batch.labeled.sum())
        assert torch.equal(batch.labeled, batch.domains == 0)
        assert (batch.targets[~batch.labeled] == -1).all()
    assert names == ["photo", "sketch"]
    assert batch.quota[1] == 2.0
    targets = {int(i): int(t) for b in data.train_dataloader() for i, t in zip(b.sample_ids, b.targets) if t >= 0}
    photo = data.prepared[0]
    folder = {int(i): Path(w).parent.name for i, w in zip(photo.ids, photo.where)}
    assert all(photo.domain.labels[t] == folder[i] for i, t in targets.items())


def permute_labels(root: Path, domain: str) -> None:
    """Move every image of a domain into another class folder, so that path order changes too."""
    files = sorted((root / domain).rglob("*.png"))
    classes = [f.parent.name for f in files]
    moved = np.random.default_rng(3).permutation(classes)
    stage = root / "stage"
    stage.mkdir()
    for i, f in enumerate(files):
        f.rename(stage / f"{i}.png")
    for i, label in enumerate(moved):
        shutil.move(stage / f"{i}.png", root / domain / str(label) / f"x{len(files) - i:03d}.png")
    stage.rmdir()


def test_permuting_the_labels_of_an_unlabeled_target_changes_nothing_but_its_test_targets(images, image_spec):
    shutil.copy(images / "sketch/cat/000.png", images / "sketch/dog/twin.png")

    def run() -> tuple[DomainData, list[Batch], list[Batch], list[Batch]]:
        data = both(images, image_spec, target_labels="none", batch_size=6)
        val, test = data.val_dataloader()[1], data.test_dataloader()[1]
        return data, list(data.train_dataloader()), list(val), list(test)

    data, train, val, test = run()
    permute_labels(images, "sketch")
    other, train2, val2, test2 = run()
    assert_equal(train, train2)
    assert_equal(val, val2)
    assert data.split_manifest() == other.split_manifest()
    assert data.fingerprint == other.fingerprint
    assert not any(b.labeled.any() for b in val)
    assert [b.sample_ids.tolist() for b in test] == [b.sample_ids.tolist() for b in test2]
    assert all(b.labeled.all() for b in test)
    assert any(not torch.equal(a.targets, b.targets) for a, b in zip(test, test2))
    assert data.domains[1].labels == ("cat", "dog", "owl")
    sketch = data.prepared[1]
    assert (sketch.targets[sketch.split < 2] == -1).all(), "the labels are gone, not hidden"


def test_permuting_csv_labels_of_an_unlabeled_target_changes_nothing(texts, text_spec):
    def run() -> list[Batch]:
        return list(both(texts, text_spec, target_labels="none").train_dataloader())

    first = run()
    lines = (texts / "kitchen.csv").read_text().splitlines()
    rows = [line.rsplit(",", 1) for line in lines[1:]]
    labels = np.random.default_rng(0).permutation([r[1] for r in rows])
    (texts / "kitchen.csv").write_text("\n".join([lines[0], *(f"{r[0]},{v}" for r, v in zip(rows, labels))]) + "\n")
    assert_equal(first, run())


def test_splits_are_disjoint_by_content_and_independent_of_paths(images, image_spec):
    for i in range(4):
        shutil.copy(images / f"sketch/cat/00{i}.png", images / f"sketch/cat/copy{i}.png")
    data = both(images, image_spec)
    sketch = data.prepared[1]
    content = [Path(w).read_bytes() for w in sketch.where]
    by_split = [{c for c, s in zip(content, sketch.split) if s == part} for part in range(3)]
    assert sum(map(len, by_split)) == len(set().union(*by_split))
    assert len(set(sketch.ids.tolist())) == 64
    assert (np.diff(sketch.ids) > 0).all()
    (images / "sketch/cat/000.png").rename(images / "sketch/cat/zzz.png")
    assert both(images, image_spec).split_manifest() == data.split_manifest()
    assert both(images, image_spec, seed=5).fingerprint == data.fingerprint
    assert both(images, image_spec, split_seed=5).fingerprint != data.fingerprint


def test_shots_leave_the_rest_unlabeled_and_hold_validation_to_the_budget(images, image_spec):
    data = both(images, image_spec, shots=3)
    row = data.describe()[1]
    assert (row["train_labels"], row["val_labels"], row["test_labels"]) == (9, 0, row["test"])
    assert data.class_counts("sketch") == [3, 3, 3]
    assert [p.name for p in data.pools()] == ["photo/labeled", "sketch/labeled"]
    data.include("target", labels=False)
    assert [(p.name, p.quota) for p in data.pools()] == [
        ("photo/labeled", 4), ("sketch/labeled", 2), ("sketch/unlabeled", 2),
    ]  # fmt: skip
    assert len(data.pools()[2]) == row["train"] - 9
    split = both(images, image_spec, shots=4, validation_from_labels=True).describe()[1]
    assert (split["train_labels"], split["val_labels"]) == (9, 3)
    few = both(images, image_spec, fraction=0.5).describe()[1]
    assert few["train_labels"] == pytest.approx(few["train"] / 2, abs=2)
    assert few["val_labels"] == 0


def test_shots_of_a_class_without_training_rows_are_refused(tmp_path):
    rows = [f"t {i},{i % 2},train" for i in range(40)] + [f"u {i},2,test" for i in range(9)]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "\n".join(rows))
    missing = r"the train split of 'a' has of class '2' \(0\)"
    with pytest.raises(ConfigError, match=missing):
        DomainData(tmp_path, target="a", shots=3).prepare()
    with pytest.raises(ConfigError, match=missing + r", which data\.labels names"):
        DomainData(tmp_path, target="a", shots=3, labels=[0, 1, 2]).prepare()
    (tmp_path / "mood.csv").write_text("text,score\n" + "\n".join(f"a b {i},{i / 7}" for i in range(60)))
    with pytest.raises(ConfigError, match=r"data\.shots=3 .*'mood' has kind regression; use data\.fraction"):
        DomainData(tmp_path, target="mood", shots=3).prepare()


def test_a_method_gets_source_rows_with_their_labels_or_without(images, image_spec):
    without = DomainData(images, "photo", "sketch", train_on="target", batch_size=8)
    without.bind(image_spec)
    without.include("source", labels=False)
    assert [(p.name, p.labeled, p.quota) for p in without.pools()] == [
        ("photo/unlabeled", False, 4), ("sketch/labeled", True, 4),
    ]  # fmt: skip
    assert without.training_domains == ("sketch",)
    batch = next(iter(without.train_dataloader()))
    assert (batch.labeled == (batch.domains == 1)).all()
    assert (batch.targets[~batch.labeled] == -1).all()
    without.include("source")
    assert [(p.name, p.labeled) for p in without.pools()] == [("photo/labeled", True), ("sketch/labeled", True)]
    assert set(without.training_domains) == {"photo", "sketch"}


def test_a_leg_inherits_splits_and_refuses_other_data(images, image_spec):
    parent = both(images, image_spec, split_seed=7)
    child = both(images, image_spec)
    child.use_manifest(parent.split_manifest())
    assert child.split_manifest() == parent.split_manifest()
    assert child.describe()[0]["split"] == "inherited"
    with pytest.raises(ConfigError, match="use_manifest comes too late"):
        child.use_manifest({})
    (images / "sketch/cat/000.png").unlink()
    changed = both(images, image_spec)
    changed.use_manifest(parent.split_manifest())
    with pytest.raises(
        SplitError, match=r"'sketch' is not what the inherited splits were made of: 0 new rows, 1 missing"
    ):
        changed.prepare()


def test_evaluation_loaders_follow_eval_domains_and_sample_ids(images, image_spec):
    data = both(images, image_spec, splits=(0.6, 0.2, 0.2), augment="randaugment")
    assert data.eval_domains("val") == data.eval_domains("test") == ["photo", "sketch"]
    for number, loader in enumerate(data.test_dataloader()):
        batches, again = list(loader), list(loader)
        assert_equal(batches, again)
        ids = torch.cat([b.sample_ids for b in batches])
        assert ids.tolist() == sorted(ids.tolist())
        assert {int(d) for b in batches for d in b.domains} == {number}
        assert batches[0].step == -1
        assert batches[0].labeled.all()
    assert both(images, image_spec, splits=(0.8, 0.0, 0.2)).val_dataloader() == []


def test_texts_are_padded_to_the_batch_and_masked(texts, text_spec):
    data = both(texts, text_spec, max_length=6)
    widths = set()
    for batch in data.train_dataloader():
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        assert ids.shape == mask.shape == batch.inputs["token_type_ids"].shape
        assert mask.sum(1).max() == ids.shape[1] <= 6
        assert (ids[mask == 0] == 0).all()
        assert (ids[:, 0] == 2).all()
        widths.add(ids.shape[1])
    books = data.prepared[0]
    row = data.dataset.tokens.row(0)
    want = text_spec.tokenizer(books.inputs[0], truncation=True, max_length=6)["input_ids"]
    assert row["input_ids"].tolist() == want


def test_text_pairs(tmp_path, text_spec):
    lines = ["premise,hypothesis,label", *(f"a b {i},c d e,{('no', 'yes')[i % 2]}" for i in range(40))]
    (tmp_path / "nli.csv").write_text("\n".join(lines))
    data = DomainData(tmp_path, target="nli", batch_size=4)
    data.bind(text_spec)
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs["token_type_ids"].unique().tolist() == [0, 1]
    assert (batch.inputs["input_ids"] == 3).sum(1).tolist() == [2, 2, 2, 2]


def test_rows_to_predict_keep_their_order(images, texts, image_spec, text_spec):
    files = [str(images / "sketch/dog/003.png"), str(images / "photo/cat"), str(images / "sketch/cat/001.png")]
    data = DomainData("nowhere", target="x", inputs=files, batch_size=4)
    data.bind(image_spec)
    batches = list(data.predict_dataloader())
    assert sum(len(b) for b in batches) == 22
    assert [Path(w).name for w in data.predicted.where[:2]] == ["003.png", "000.png"]
    alone = DomainData("nowhere", target="x", inputs=files[2])
    alone.bind(image_spec)
    assert torch.equal(
        next(iter(alone.predict_dataloader())).inputs["pixel_values"][0], batches[-1].inputs["pixel_values"][-1]
    )
    assert not any(b.labeled.any() for b in batches)
    table = DomainData("nowhere", target="x", inputs=str(texts / "books.csv"))
    table.bind(text_spec)
    assert table.predicted.where[1].endswith("books.csv: row 2")
    assert sum(len(b) for b in table.predict_dataloader()) == 80


def fake_trainer(**kw) -> SimpleNamespace:
    base = {"world_size": 2, "global_rank": 1, "accumulate_grad_batches": 2, "global_step": 0}
    inner = SimpleNamespace(use_distributed_sampler=kw.pop("replace", False))
    return SimpleNamespace(**{**base, **kw}, _accelerator_connector=inner)


def test_the_trainer_decides_division_and_position(images, image_spec):
    data = both(images, image_spec, batch_size=4)
    data.trainer = fake_trainer(global_step=3)
    assert data.state_dict() == {"step": 3}
    loader = data.train_dataloader()
    assert len(loader) == 2 * data.steps_per_epoch
    assert [b.step for b in loader][:3] == [3, 3, 4]
    assert data.steps_per_epoch == -(-42 // 8)
    data.trainer = fake_trainer(replace=True)
    for make in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        with pytest.raises(ConfigError, match=r"trainer\.use_distributed_sampler=true would replace the order"):
            make()


def test_position_without_a_trainer(images, image_spec):
    data = both(images, image_spec)
    whole = list(data.train_dataloader())
    again = both(images, image_spec)
    again.load_state_dict({"step": 4})
    assert_equal(list(again.train_dataloader()), whole[4:])
    assert again.state_dict() == {"step": len(whole)}


def test_numbers_become_a_regression_and_lists_a_multilabel_target(tmp_path, text_spec):
    (tmp_path / "mood.csv").write_text("text,score\n" + "\n".join(f"a b {i},{i / 7}" for i in range(60)))
    (tmp_path / "tags.csv").write_text(
        "text,label\n" + "\n".join(f"a b {i},{('x', 'x|y', 'z')[i % 3]}" for i in range(60))
    )
    mood = DomainData(tmp_path, target="mood", batch_size=8)
    mood.bind(text_spec)
    assert (mood.domains[0].kind, mood.domains[0].labels) == ("regression", ("value",))
    known = [v for b in mood.train_dataloader() for v in b.targets.tolist()]
    assert mood.label_moments() == pytest.approx((np.mean(known), np.std(known)), rel=1e-5)
    tags = DomainData(tmp_path, target="tags", batch_size=8)
    tags.bind(text_spec)
    batch = next(iter(tags.train_dataloader()))
    assert (tags.domains[0].kind, tags.domains[0].labels) == ("multilabel", ("x", "y", "z"))
    assert batch.targets.shape == (8, 3)
    assert tags.class_counts()[0] > tags.class_counts()[1]
    assert {tuple(t) for t in batch.targets.tolist()} <= {(1, 0, 0), (1, 1, 0), (0, 0, 1)}


def test_a_random_split_of_labeled_rows_is_that_of_the_same_rows_without_labels(images, image_spec):
    def split(**options):
        return both(images, image_spec, **options).split_manifest()["sketch"]

    unlabeled = split(split="stratified", target_labels="none")
    assert split(split="random") == unlabeled
    assert split(split="stratified") != unlabeled


def test_label_spaces_differ_or_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"t {i},{i % 12}" for i in range(240)))
    (tmp_path / "b.csv").write_text("text,label\n" + "\n".join(f"u {i},{i % 2}" for i in range(60)))
    data = DomainData(tmp_path, "a", "b")
    assert data.domains[0].labels == tuple(map(str, range(12))), "by value, not by alphabet"
    assert data.domains[1].labels == ("0", "1")
    assert DomainData(tmp_path, "a", "b", target_labels="none").domains[1].labels == data.domains[0].labels
    assert DomainData(tmp_path, "a", eval="b", train_on="source").domains[1].labels == data.domains[0].labels
    named = DomainData(tmp_path, target="b", labels=[1, 0])
    assert named.domains[0].labels == ("1", "0")


def test_limit_takes_the_first_by_sample_id(images):
    whole, some = DomainData(images, target="photo"), DomainData(images, target="photo", limit=30)
    assert some.prepared[0].ids.tolist() == whole.prepared[0].ids[:30].tolist()


def test_class_and_domain_samplers(images, image_spec):
    for f in sorted((images / "photo/cat").glob("*"))[6:]:
        f.unlink()
    data = DomainData(images, target=["photo", "sketch"], sampler="class", batch_size=12)
    data.bind(image_spec)
    batch = next(iter(data.train_dataloader()))
    photo = batch.targets[batch.domains == 0]
    assert np.ptp(np.bincount(photo, minlength=3)) <= 1
    sizes = [p.quota for p in DomainData(images, target=["photo", "sketch"], batch_size=12).pools()]
    assert sizes == [5, 7]
    assert [
        p.quota for p in DomainData(images, target=["photo", "sketch"], batch_size=12, sampler="domain").pools()
    ] == [6, 6]


def test_batches_move(images, image_spec):
    batch = next(iter(both(images, image_spec).train_dataloader()))
    moved = batch.to("meta")
    assert moved is not batch
    assert all(t.device.type == "meta" for t in tensors(moved))
    assert (moved.quota, moved.step) == (batch.quota, batch.step)


def test_a_signal_while_an_image_is_read_is_not_taken_for_the_images_fault(images, image_spec, monkeypatch):
    loader = both(images, image_spec).test_dataloader()[0]
    monkeypatch.setattr(dataset, "open_image", lambda source: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Stopping():
        next(iter(loader))


def test_an_image_that_breaks_after_the_check_is_named(images, image_spec):
    data = both(images, image_spec, num_workers=1)
    data.prepare()
    (images / "photo/cat/000.png").write_bytes(b"gone bad")
    loaders = [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    with pytest.raises(DataError, match=r"photo/cat/000\.png: unreadable image"):
        [list(loader) for loader in loaders]


def test_workers_outlast_the_signals_that_a_scheduler_sends_to_every_process(images, image_spec):
    expected = list(both(images, image_spec, batch_size=4).train_dataloader())
    batches = iter(loader := both(images, image_spec, batch_size=4, num_workers=1).train_dataloader())
    found = [next(batches)]
    (worker,) = loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    found += batches
    assert len(found) > 6, "more than a worker prepares ahead"
    assert_equal(expected, found)
    with contextlib.suppress(RuntimeError):  # torch tells of it, where it sees it first
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(20)
    assert not worker.is_alive(), "the second one, as a loader sends it to a worker that hangs"


def test_test_rows_that_another_domain_trains_on_are_counted(images, image_spec):
    data = both(images, image_spec)
    assert [r["test_seen"] for r in data.describe()] == [0, 0]
    photo = data.prepared[0]
    shutil.copy(photo.where[photo.rows("test")[0]], images / "sketch/cat/leak.png")
    seen = [both(images, image_spec, split_seed=s).describe() for s in range(8)]
    sketch = [both(images, image_spec, split_seed=s).prepared[1] for s in range(8)]
    leaked = [next(int(p.split[i]) for i, w in enumerate(p.where) if w.endswith("leak.png")) for p in sketch]
    photos = [both(images, image_spec, split_seed=s).prepared[0] for s in range(8)]
    home = [int(p.split[p.ids == photo.ids[photo.rows("test")[0]]][0]) for p in photos]
    expected = [[int((h, k) == (2, 0)), int((h, k) == (0, 2))] for h, k in zip(home, leaked)]
    assert [[r["test_seen"] for r in rows] for rows in seen] == expected


def test_binding_the_same_spec_again_keeps_the_tokens(texts, text_spec):
    data = both(texts, text_spec)
    dataset = data.dataset
    data.bind(TextSpec(text_spec.tokenizer, text_spec.max_length))
    assert data.dataset is dataset
    data.bind(TextSpec(text_spec.tokenizer, 4))
    assert data.dataset.tokens.lengths.max() <= 4 < dataset.tokens.lengths.max()


def test_left_padding_puts_the_text_last(texts, text_spec):
    text_spec.tokenizer.padding_side = "left"
    data = both(texts, text_spec, batch_size=40)
    batch = next(iter(data.train_dataloader()))
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert mask.min() == 0
    assert (mask[:, -1] == 1).all()
    assert (ids[:, -1] == 3).all()
    rows = {int(i): n for n, i in enumerate(data.dataset.sample_ids)}
    for i, sample in enumerate(batch.sample_ids.tolist()):
        assert ids[i][mask[i] == 1].tolist() == data.dataset.tokens.row(rows[sample])["input_ids"].tolist()
