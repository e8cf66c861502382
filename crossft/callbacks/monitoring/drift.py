"""How far a run has moved from where it started, and what the source makes of it, while it trains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from numpy.typing import NDArray
from torch import Tensor, nn

from crossft.callbacks.retention.rehearsal import seen_by
from crossft.data.prepare import first_rows
from crossft.errors import ConfigError
from crossft.functional.similarity import linear_cka
from crossft.metrics import domain_metrics, primary_metric
from crossft.tasks import Task
from crossft.types import Batch, Stage

__all__ = ["Drift", "StartingWeights", "chosen", "stage_drift"]

Rows = dict[int, NDArray[np.int64]]


@torch.no_grad()
def stage_drift(start: Iterable[Tensor], now: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Distance of some weights from where they started, summed in float64.

    Args:
        start: copies of the parameters; one at a time is looked at.
        now: the parameters.

    Returns:
        ``l2``: ||w - w0||; ``relative``: that over ||w0||; ``cosine``: of w and w0. NaN where w0 is zero.
    """
    squares = []
    for old, parameter in zip(start, now, strict=True):
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        a, p = (t.float() if half else t for t in (old.to(parameter.device), parameter.detach()))
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (p.sub(a), a, p)]
        squares.append(torch.stack(norms).square())
    far, before, after = torch.stack(squares).sum(0)
    along = 0.5 * (before + after - far)  # the law of cosines
    return {
        "l2": far.sqrt(),
        "relative": (far / before).sqrt(),
        "cosine": along / (before.sqrt() * after.sqrt()),
    }


class StartingWeights:
    """The weights that a run starts from, in a file without a name, which is gone when nobody holds this any more.

    A copy in memory would be the largest thing that a run adds to a hand-written loop's.

    Args:
        stages: whose parameters are kept.
        folder: where the file is made.

    Raises:
        ConfigError: there is no room.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path) -> None:
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            for stage in stages:
                for parameter in stage.parameters():
                    form = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    self._places.setdefault(stage.name, []).append((self._file.tell(), form))
                    self._write(parameter.detach().cpu().contiguous())
        except OSError as error:
            raise ConfigError(
                f"the weights that the run starts from cannot be kept in {folder}: {error}; make room there, or choose "
                "another run.root"
            ) from error

    def _write(self, value: Tensor) -> None:
        left = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0, np.uint8)
        while len(left):
            left = left[self._file.write(left.data) :]

    def close(self) -> None:
        """Give the room back."""
        self._file.close()

    def of(self, stage: str) -> Iterator[Tensor]:
        """A stage's parameters as they were, on the CPU, read one at a time."""
        for place, form in self._places[stage]:
            self._file.seek(place)
            value = torch.empty(form.shape, dtype=form.dtype)
            if value.numel():
                read = np.fromfile(self._file, np.uint8, value.numel() * value.element_size())
                value.copy_(torch.from_numpy(read).view(form.dtype).reshape(form.shape))
            yield value


class Drift(Callback):
    """Logs, at every epoch's end and every ``every_n_steps``, what has become of the starting model.

    - ``drift/STAGE/l2``, ``relative`` and ``cosine``: a stage's weights against those the run started from.
    - ``drift/features/cka``: linear CKA (Kornblith et al. 2019) of the features of some source rows, then and now.
    - ``DOMAIN/probe/METRIC``: a source's primary metric on these rows.
    - ``term/NAME/ratio``, with the losses: norm of a weight penalty's weighted gradient over that of the task loss and
      the loss terms (before gradient projections), on the weights the penalty acts on.

    The rows are from the sources' validation split (else training), unaugmented, in evaluation mode. Modes, buffers,
    generators and gradients are left as they were. Memory: for a step that logs a ratio one more gradient; the starting
    weights are in a temporary file in the run folder. Strategies that shard weights log nothing here.

    Args:
        rows: source rows, over all sources; 0 leaves out what needs rows.
        every_n_steps: optimizer steps between measurements within an epoch; None: epoch ends only.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(self, rows: int = 64, every_n_steps: int | None = None) -> None:
        if rows < 0:
            raise ConfigError(f"watch.rows={rows} must be 0 or more; 0 measures no rows")
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"watch.every_n_steps={every_n_steps} must be at least 1; null measures at epoch ends")
        self.rows, self.every_n_steps = rows, every_n_steps
        self._start: StartingWeights | None = None
        self._watches = False
        self._own: Rows = {}
        self._features: dict[int, Tensor] = {}
        self._done = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the weights and the features of some rows; before a checkpoint is restored, so a resume has the same."""
        sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
        if stage != "fit" or not isinstance(pl_module, Task) or sharded:
            return
        self._watches = True
        if trainer.is_global_zero:  # which logs
            self._start = StartingWeights(pl_module.backbone.stages, Path(trainer.default_root_dir))
        self._own = chosen(trainer.datamodule, self.rows) if self.rows else {}  # type: ignore[attr-defined]
        self._features = {n: own[0] for n, own in self._seen(trainer, pl_module).items()}
        self._done = -1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the room of the starting weights back."""
        if stage == "fit":
            self._watches = False
            if self._start is not None:
                self._start.close()
            self._start = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the ratios at steps that log anyway."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._watches and every and (trainer.global_step + 1) % every == 0:
            assert isinstance(pl_module, Task)
            ratios = pl_module.attachments.gradient_ratios(list(pl_module.parameters()), pl_module.progress)
            _log(trainer, {f"term/{name}/ratio": value for name, value in ratios.items()}, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is due."""
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, task: LightningModule) -> None:
        assert isinstance(task, Task)
        if not self._watches or self._done == trainer.global_step:
            return
        self._done = trainer.global_step
        values: dict[str, Any] = {}
        for stage in task.backbone.stages:
            if self._start is not None and (own := stage.parameters()):
                found = stage_drift(self._start.of(stage.name), own)
                values |= {f"drift/{stage.name}/{k}": v for k, v in found.items()}
        seen = self._seen(trainer, task)
        if seen:
            old, new = (
                torch.cat([part[n] for n in seen]) for part in (self._features, {n: v[0] for n, v in seen.items()})
            )
            values["drift/features/cka"] = linear_cka(old, new)
        values |= self._scores(trainer, task, {n: v[1] for n, v in seen.items()})
        _log(trainer, values, trainer.global_step - 1)

    def _seen(self, trainer: Trainer, task: Task) -> dict[int, tuple[Tensor, Tensor]]:
        """Features [n, d] and the own head's logits [n, k] of the rows of each source."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number, own in self._own.items():
            key = task.head_keys[task.domains[number].name]

            def read(batch: Batch, key: str = key) -> Tensor:
                step = task.model_step(batch)
                return torch.cat([step.features, step.logits[key]], 1)

            both = seen_by(task, data, {number: own}, read)
            width = task.backbone.num_features
            found[number] = (both[:, :width], both[:, width:])
        return found

    def _scores(self, trainer: Trainer, task: Task, logits: dict[int, Tensor]) -> dict[str, Tensor]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        scores: dict[str, Tensor] = {}
        for number, own in logits.items():
            domain = task.domains[number]
            prepared = data.prepared[number]
            known = prepared.labeled[self._own[number] - first_rows(data.prepared)[number]]
            if known.all():
                metrics = domain_metrics(domain)
                targets = torch.as_tensor(np.asarray([data.dataset.targets[row] for row in self._own[number]]))
                metrics.update(
                    task.predictions(own, domain), targets.long() if domain.kind == "multilabel" else targets
                )
                name = primary_metric(domain.kind).name
                scores[f"{task.evaluation.names[domain.name]}/probe/{name}"] = metrics[name].compute()
        return scores


def chosen(data: Any, count: int) -> Rows:
    """Some dataset rows of the sources by domain id, the same for every seed and process."""
    found: Rows = {}
    for number, (p, start) in enumerate(zip(data.prepared, first_rows(data.prepared))):
        own = p.rows("val") if len(p.rows("val")) else p.rows("train")
        if p.domain.role == "source" and len(own):
            found[number] = start + own
    for number, own in found.items():
        keep = np.random.default_rng(0).permutation(len(own))[: max(2, count // len(found))]
        found[number] = np.sort(own[keep])
    return found


def _log(trainer: Trainer, values: dict[str, Any], step: int) -> None:
    if values and trainer.is_global_zero:
        plain = {name: float(value) for name, value in values.items()} | {"epoch": float(trainer.current_epoch)}
        for logger in trainer.loggers:
            logger.log_metrics(plain, step=step)
