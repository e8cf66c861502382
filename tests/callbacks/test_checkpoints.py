"""Resuming from every checkpoint of a run gives the bits of the run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny import TinyVision, image_domains

from crossft.callbacks.adaptation import DANN
from crossft.callbacks.monitoring import (
    AtomicCheckpointIO,
    Checkpoints,
    RunLog,
    Stopping,
    latest_valid,
    load_checkpoint,
)
from crossft.callbacks.monitoring.checkpoint_io import check, manifest_of, publish
from crossft.callbacks.retention import L2SP
from crossft.data import DomainData
from crossft.errors import CheckpointError, Interrupted
from crossft.optim import Cosine, Plateau, Schedule
from crossft.runs import RunFolder, read_metrics
from crossft.tasks import Classification


class Recorder(Callback):
    """Keeps the sample ids of every micro-batch, and draws from every global generator as a careless method would."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.noise: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.global_step, batch.sample_ids.tolist()))
        self.noise.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


EVERY_STEP = {"every_n_steps": 1, "keep": 100}


def train(
    data_root: Path,
    folder: Path,
    resume: Path | None = None,
    extra: tuple[Callback, ...] = (),
    saves: dict | None = None,
    schedule: Schedule | None = None,
    **kwargs,
):
    """Fit, or resume; ``saves`` changes what is saved, by default every step."""
    seed_everything(7, verbose=False)
    data = DomainData(
        root=data_root, source="photo", target="sketch", train_on=["source", "target"], target_labels="none",
        batch_size=8, augment="flip", seed=7,
    )  # fmt: skip
    data.prepare()
    task = Classification(
        TinyVision(dropout=0.3, batchnorm=True),
        list(data.domains),
        schedule=schedule or Cosine(warmup=2),
        batchnorm="training",
    )
    recorder = Recorder()
    start = 0 if resume is None else load_checkpoint(resume)["global_step"]
    trainer = Trainer(
        **{"max_epochs": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, **kwargs},
        callbacks=[DANN(hidden=8), L2SP(weight=0.1), recorder, Checkpoints(folder, **(saves or EVERY_STEP)), *extra],
        plugins=[AtomicCheckpointIO()],
        logger=RunLog(folder, start),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return trainer, recorder


def equal(a, b, path: str = "") -> None:
    """Assert bit-equality of nested tensors and plain values."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    root = image_domains(folder / "data", each=16)
    trainer, recorder = train(root, folder / "run")
    return root, folder / "run", recorder, trainer.global_step


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.ckpt"), key=lambda p: int(p.stem.split("-")[1]))


def test_every_step_and_every_epoch_end_was_saved(whole) -> None:
    _, folder, _, steps = whole
    assert [int(p.stem.split("-")[1]) for p in checkpoints(folder)] == list(range(1, steps + 1))
    assert steps % 3 == 0
    assert steps >= 6


def test_resume_from_every_checkpoint_is_bit_equal(whole, tmp_path: Path) -> None:
    root, folder, recorder, _ = whole
    final = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    rows = read_metrics(RunFolder(folder).metrics)
    for path in checkpoints(folder)[:-1]:
        start = int(path.stem.split("-")[1])
        run = tmp_path / str(start)
        (run / "checkpoints").mkdir(parents=True)
        (run / "anchors").symlink_to(folder / "anchors")
        (run / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes())
        _, other = train(root, run, resume=path)
        again = load_checkpoint(run / "checkpoints" / "last.ckpt")
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "terms", "global_step", "epoch", "callbacks"):
            equal(final[part], again[part], f"from step {start}: {part}")
        after = [(s, ids) for s, ids in recorder.seen if s >= start]
        assert other.seen == after, f"sample ids after step {start}"
        assert other.noise == recorder.noise[len(recorder.seen) - len(after) :], f"generators after step {start}"
        assert repr(read_metrics(run / "metrics.csv")) == repr(rows)


class Epochs(Callback):
    """The steps at which epochs ended."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, *_) -> None:
        self.ended.append(trainer.global_step)


@pytest.mark.parametrize("epochs", [-1, 3])
def test_an_epoch_that_ended_is_not_gone_through_again_where_steps_are_limited(
    whole, tmp_path: Path, epochs: int
) -> None:
    root, _, _, steps = whole
    limits = {"max_epochs": epochs, "max_steps": steps - 1}  # the last epoch ends early
    one = Epochs()
    _, recorder = train(root, tmp_path / "one", extra=(one,), **limits)
    rows, final = read_metrics(tmp_path / "one" / "metrics.csv"), load_checkpoint(RunFolder(tmp_path / "one").last)
    assert len(one.ended) == 3
    for start in one.ended[:2]:
        other, run = Epochs(), tmp_path / f"from-{start}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "anchors").symlink_to(tmp_path / "one" / "anchors")
        (run / "metrics.csv").write_bytes((tmp_path / "one" / "metrics.csv").read_bytes())
        path = tmp_path / "one" / "checkpoints" / f"step-{start}.ckpt"
        _, again = train(root, run, resume=path, extra=(other,), **limits)
        assert other.ended == [step for step in one.ended if step > start]
        assert again.seen == [(s, ids) for s, ids in recorder.seen if s >= start]
        assert repr(read_metrics(run / "metrics.csv")) == repr(rows)
        resumed = load_checkpoint(RunFolder(run).last)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            equal(final[part], resumed[part], f"from step {start}: {part}")


class TerminateAt(Callback):
    def __init__(self, micro: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.micro, self.number, self.count = micro, number, 0

    def on_train_batch_start(self, *_) -> None:
        self.count += 1
        if self.count == self.micro:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("micro", "number"), [(3, signal.SIGTERM), (8, signal.SIGUSR1), (3, signal.SIGINT)])
def test_a_signal_saves_at_the_next_boundary_and_stops(
    whole, tmp_path: Path, micro: int, number: signal.Signals
) -> None:
    """A signal within an accumulation window waits for its step; at an epoch's last step, for the validation."""
    root, folder, _, _ = whole
    former = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} at optimizer step .* after saving") as stop:
        train(root, tmp_path, extra=(TerminateAt(micro, number),))
    assert stop.value.requeue == (number is signal.SIGUSR1)
    path = latest_valid(tmp_path / "checkpoints")
    assert int(path.stem.split("-")[1]) == (micro + 1) // 2
    _, other = train(root, tmp_path, resume=path)
    equal(
        load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"],
        load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"],
    )
    assert other.seen[0][0] == (micro + 1) // 2
    logged = [read_metrics(RunFolder(run).metrics) for run in (folder, tmp_path)]
    assert repr(logged[1]) == repr(logged[0]), "the step at which it stopped is in metrics.csv"
    assert signal.getsignal(number) == former


def test_a_signal_outside_of_training_stops_at_once_and_a_second_interrupt_does_too() -> None:
    former = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(Interrupted, match="stopped by SIGUSR2") as stop, Stopping():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.value.requeue
    assert signal.getsignal(signal.SIGUSR2) == former
    with Stopping() as stopping:
        stopping.take(training=True)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            stopping.check()


def test_a_damaged_or_half_written_checkpoint_is_passed_over(whole, tmp_path: Path) -> None:
    _, folder, _, _ = whole
    for path in checkpoints(folder)[-3:]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
        manifest_of(tmp_path / path.name).write_bytes(manifest_of(path).read_bytes())
    third, second, first = sorted(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.split("-")[1]))
    assert latest_valid(tmp_path) == first
    complete = manifest_of(first).read_bytes()
    for damaged in (b"", b'{"a"', b"\xff", complete[: len(complete) // 2], b"[]", b"null"):
        manifest_of(first).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{first.name}\.manifest\.json (is damaged|does not describe)"):
            check(first)
        assert latest_valid(tmp_path) == second
    manifest_of(first).write_bytes(complete)
    assert latest_valid(tmp_path) == first
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        check(first)
    manifest_of(second).unlink()
    with pytest.raises(CheckpointError, match="not completely written"):
        check(second)
    assert latest_valid(tmp_path) == third
    third.write_bytes(third.read_bytes()[:-10])
    assert latest_valid(tmp_path) is None


def test_published_names_hold_the_same_checkpoint(whole) -> None:
    _, folder, _, _ = whole
    check(folder / "checkpoints" / "last.ckpt")
    newest = checkpoints(folder)[-1]
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == newest.read_bytes()


def test_the_checkpoint_holds_backbone_and_heads_and_the_terms_apart(whole) -> None:
    _, folder, _, _ = whole
    saved = load_checkpoint(checkpoints(folder)[-1])
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"backbone", "heads"}
    assert set(saved["terms"]) == {"dann", "l2sp"}
    assert saved["terms"]["l2sp"]["state"] == {}  # its anchors lie in the run folder, once
    assert saved["terms"]["l2sp"]["anchors"]["file"] == "l2sp.safetensors"
    assert "hyper_parameters" not in saved
    assert [d["labels"] for d in saved["domains"]] == [["cat", "dog"]] * 2


def test_a_changed_anchor_is_refused(whole, tmp_path: Path) -> None:
    root, folder, _, _ = whole
    (tmp_path / "anchors").mkdir()
    data = bytearray((folder / "anchors" / "l2sp.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "anchors" / "l2sp.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        train(root, tmp_path, resume=checkpoints(folder)[0])


def test_publish_copies_where_links_are_not_possible(whole, tmp_path: Path, monkeypatch) -> None:
    _, folder, _, _ = whole
    source = checkpoints(folder)[0]
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    manifest_of(copy).write_bytes(manifest_of(source).read_bytes())

    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    publish(copy, "best.ckpt")
    check(tmp_path / "best.ckpt")
    assert json.loads(manifest_of(tmp_path / "best.ckpt").read_text())["file"] == "best.ckpt"


def test_a_kill_between_a_save_and_its_publication_is_mended(whole, tmp_path: Path) -> None:
    """The newest step is saved, ``last.ckpt`` and ``best.ckpt`` are still the step before; a resume puts them right."""
    root, folder, _, steps = whole
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "anchors").symlink_to(folder / "anchors")
    before, newest = checkpoints(folder)[-2:]
    for path in (before, newest):
        saved = load_checkpoint(path)
        key = next(k for k in saved["callbacks"] if k.startswith("Checkpoints"))
        saved["callbacks"][key]["best_step"] = steps
        AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "checkpoints" / path.name)
    for name in ("last.ckpt", "best.ckpt"):
        publish(tmp_path / "checkpoints" / before.name, name)
    (tmp_path / "checkpoints" / ".tmp-abc-step-9.ckpt").write_bytes(b"half")
    train(root, tmp_path, resume=tmp_path / "checkpoints" / newest.name)
    for name in ("last.ckpt", "best.ckpt"):
        check(tmp_path / "checkpoints" / name)
        assert load_checkpoint(tmp_path / "checkpoints" / name)["global_step"] == steps
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_checkpoint_never_outlives_a_good_one(whole, tmp_path: Path, keep: int) -> None:
    """The newest file lost its manifest, the run resumes from the one before: what it saves next must be valid."""
    root, folder, _, _ = whole
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "anchors").symlink_to(folder / "anchors")
    for step in (2, 5):
        name = f"step-{step}.ckpt"
        (tmp_path / "checkpoints" / name).write_bytes((folder / "checkpoints" / name).read_bytes())
    good = tmp_path / "checkpoints" / "step-2.ckpt"
    manifest_of(good).write_bytes(manifest_of(folder / "checkpoints" / "step-2.ckpt").read_bytes())
    assert latest_valid(tmp_path / "checkpoints") == good
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append((trainer.global_step, [int(p.stem[5:]) for p in checkpoints(tmp_path)]))
            if batch_idx % 2 == 0:
                assert latest_valid(tmp_path / "checkpoints").name == f"step-{trainer.global_step}.ckpt"

    train(root, tmp_path, resume=good, extra=(Look(),), saves={"every_n_steps": 1, "keep": keep}, max_steps=5)
    assert seen[0] == (2, [2])
    assert dict(seen)[4] == [3, 4][-keep:]


def test_pruning_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 3, 4, 9):
        (tmp_path / "checkpoints" / f"step-{step}.ckpt").touch()
    callback = Checkpoints(tmp_path, keep=1)
    callback.saved_step = 4
    callback._prune(Trainer(logger=False, accelerator="cpu", plugins=[AtomicCheckpointIO()]))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-4.ckpt", "step-9.ckpt"]


# -- validations within an epoch: of 6 micro-batches ---------------------------------------------------------------


class Scripted(Callback):
    """Logs a score by optimizer step, 0.1 elsewhere; keeps the step and the state of every model it is given to."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores
        self.validated: list[tuple[int, dict[str, torch.Tensor]]] = []

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("a/val/score", torch.tensor(self.scores.get(trainer.global_step, 0.1)))
        if not trainer.sanity_checking:
            self.validated.append((trainer.global_step, {k: v.clone() for k, v in pl_module.state_dict().items()}))


def saved_steps(folder: Path) -> list[int]:
    return [int(p.stem[5:]) for p in checkpoints(folder)]


def test_the_best_checkpoint_is_the_model_whose_score_was_best(whole, tmp_path: Path) -> None:
    """Validations at steps 4, 10 and 16, epoch ends at 6, 12 and 18; the sanity check's score is no model's."""
    scripted = Scripted({0: 9.0, 4: 0.5, 10: 0.9, 16: 0.7})
    more = {"accumulate_grad_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 1}
    train(whole[0], tmp_path, extra=(scripted,), saves={"monitor": "a/val/score", "keep": 100}, **more)
    assert [step for step, _ in scripted.validated] == [4, 10, 16]
    best = load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 10
    equal(best["state_dict"], scripted.validated[1][1])
    assert saved_steps(tmp_path) == [4, 6, 10, 12, 18], "at 16 nothing was best, or due"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_validations_save_resumes_to_the_same_bits(whole, tmp_path: Path, accumulate: int) -> None:
    """Every save that falls on a validation is made, and a resume neither repeats the validation nor forgets it.

    With accumulation one of two validations comes between steps; the best one does, and ``best.ckpt`` is that model.
    """
    root = whole[0]

    def fit(folder: Path, resume: Path | None = None) -> Scripted:
        scores = {8: 0.9, 14: 0.8} if accumulate == 1 else {4: 0.9, 7: 0.8}
        scripted, schedule = Scripted(scores), Plateau("a/val/score", "max", factor=0.5, patience=0)
        more = {"accumulate_grad_batches": accumulate, "val_check_interval": 2 if accumulate == 1 else 3}
        saves = {"monitor": "a/val/score", "every_n_steps": 2 if accumulate == 1 else 1, "keep": 100}
        train(root, folder, resume=resume, extra=(scripted,), saves=saves, schedule=schedule, **more)
        return scripted

    first = fit(tmp_path / "whole")
    steps = list(range(2, 19, 2)) if accumulate == 1 else list(range(1, 10))
    assert saved_steps(tmp_path / "whole") == steps
    final = {n: load_checkpoint(tmp_path / "whole" / "checkpoints" / f"{n}.ckpt") for n in ("last", "best")}
    assert final["best"]["global_step"] == (8 if accumulate == 1 else 4)
    equal(final["best"]["state_dict"], next(v for step, v in first.validated if step == final["best"]["global_step"]))
    for path in checkpoints(tmp_path / "whole")[:-1]:
        start, run = int(path.stem[5:]), tmp_path / path.stem
        (run / "checkpoints").mkdir(parents=True)
        (run / "anchors").symlink_to(tmp_path / "whole" / "anchors")
        (run / "metrics.csv").write_bytes((tmp_path / "whole" / "metrics.csv").read_bytes())
        for file in (path, manifest_of(path)):
            (run / "checkpoints" / file.name).write_bytes(file.read_bytes())
        again = fit(run, run / "checkpoints" / path.name)
        between = {start} if accumulate == 2 and start % 3 == 1 else set()  # the validation after micro-batch 3
        assert [s for s, _ in again.validated] == [s for s, _ in first.validated if s > start or s in between]
        for name, expected in final.items():
            if name == "best" and start > expected["global_step"]:
                continue  # it was written before
            found = load_checkpoint(run / "checkpoints" / f"{name}.ckpt")
            for part in ("state_dict", "optimizer_states", "terms", "schedule", "global_step", "callbacks", "loops"):
                equal(expected[part], found[part], f"from step {start}: {name}, {part}")
        assert repr(read_metrics(run / "metrics.csv")) == repr(read_metrics(tmp_path / "whole" / "metrics.csv"))


@pytest.mark.parametrize("micro", [4, 5])
def test_a_signal_before_a_validation_stops_after_it(whole, tmp_path: Path, micro: int) -> None:
    """In the step of micro-batches 3 and 4 or in the next; the validation after the fourth belongs to step 2."""
    with pytest.raises(Interrupted, match=rf"at optimizer step {(micro + 1) // 2}, after saving"):
        train(whole[0], tmp_path, extra=(TerminateAt(micro),), saves={"keep": 2}, val_check_interval=4)
    assert saved_steps(tmp_path) == [(micro + 1) // 2]


def test_a_signal_within_a_validation_stops_at_its_end(whole, tmp_path: Path) -> None:
    class Terminate(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="at optimizer step 2, after saving"):
        train(whole[0], tmp_path, extra=(Terminate(),), saves={"keep": 2}, val_check_interval=4)
    assert saved_steps(tmp_path) == [2]
