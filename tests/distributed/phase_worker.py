"""Runs in one or two processes (torchrun): trains through four phases, then the naive way. See ``test_phases.py``."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
from backbones.tiny_models import images, noised, tiny_text, tiny_timm, tokens
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from tiny import TinyVision
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from crossft.backbones import Adapted
from crossft.callbacks.adaptation import DANN
from crossft.callbacks.freezing import GradualUnfreezing, Phase, RankSentinel
from crossft.callbacks.freezing.selection import Selection
from crossft.data import DomainData
from crossft.errors import TrainingError
from crossft.optim import Linear
from crossft.tasks import Classification
from crossft.types import Domain

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PHASES = [
    Phase(train_last=0, steps=2),
    Phase(train_last=1, steps=2, rates="rewarm", warmup=2),
    Phase(match=["middle.*"], kinds=["bias"], steps=2, moments="reset"),
    Phase(lr=0.5, rates="restart"),
]


ADAPTER_PHASES = [
    Phase(train_last=0, steps=2),
    Phase(kinds=["adapter"], steps=3, rates="rewarm", warmup=1),
    Phase(moments="reset"),
]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP2 has cut over the processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Watch(Callback):
    """Keeps the weights after every optimizer step, which parameters train, are reduced and have a gradient."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.facts: list[dict[str, object]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = list(pl_module.named_parameters())
        trains = sorted(n for n, p in named if p.requires_grad)
        wrapped = trainer.strategy.model
        ddp = isinstance(wrapped, DistributedDataParallel)
        known = wrapped._get_ddp_logging_data() if ddp else {"num_parameter_tensors": len(trains)}
        self.facts.append(
            {
                "trains": trains,
                "reduced": known["num_parameter_tensors"],
                "graded": sorted(n for n, p in named if p.grad is not None),
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            state = pl_module.state_dict().values()
            self.weights.append(torch.cat([whole(t).detach().double().reshape(-1) for t in state]))


class Naive(Callback):
    """What crossft does not do: freeze in ``setup``, thaw later, and leave DDP as it is."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.train_stages([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            pl_module.train_stages(["stem", "middle", "last"])


def fit(
    root: Path, accumulation: int, methods: list[Callback], strategy: Strategy | str = "auto", adapters: bool = False
) -> None:
    data = DomainData(
        root=str(root), source="photo", target="sketch", batch_size=16 // (WORLD * accumulation), augment="none",
        train_on=["source", "target"], target_labels="none",
    )  # fmt: skip
    data.prepare()
    seed_everything(1, verbose=False)
    net = TinyVision(batchnorm=True)
    task = Classification(
        Adapted(net, rank=2) if adapters else net,
        list(data.domains),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        schedule=Linear(warmup=2),
    )
    trainer = Trainer(
        max_steps=8,
        accumulate_grad_batches=accumulation,
        callbacks=methods,
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo") if WORLD > 1 and strategy == "auto" else strategy,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data)


FAMILIES = ("test_vit", "test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224", "bert", "deberta-v2")


def sharded_gradients(name: str, folder: Path) -> dict[str, float]:
    """Largest difference of a sharded backbone's gradients to a whole one's, by parameter; none may be lost.

    All parameters train, then biases alone, then all again.
    """
    rank = dist.get_rank()
    text = name in ("bert", "deberta-v2")
    net = noised(tiny_text(name, folder / f"{name}-{rank}") if text else tiny_timm(name))
    inputs = tokens(4) if text else images(net, 4)
    torch.manual_seed(2)
    task = Classification(net, [Domain("photo", "source", labels=("a", "b"))], batchnorm="frozen")
    whole_task = copy.deepcopy(task)
    task._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    task.configure_model()
    found: dict[str, float] = {}
    for choice in (Selection(), Selection(kinds=["bias"]), Selection()):
        for model, rows in ((whole_task, slice(0, 4)), (task, slice(2 * rank, 2 * rank + 2))):
            choice.apply(model)
            model.eval().zero_grad()
            model({k: v[rows] for k, v in inputs.items()}).logsumexp(1).mean().backward()
        for (label, mine), (_, reference) in zip(task.named_parameters(), whole_task.named_parameters()):
            assert (mine.grad is None) == (not mine.requires_grad or reference.grad is None), (name, choice, label)
            if mine.grad is not None:
                error = float((whole(mine.grad) - reference.grad).abs().max() / (1e-3 + reference.grad.abs().max()))
                found[label] = max(found.get(label, 0.0), error)
    return found


def main(root: Path, out: Path) -> None:
    results: dict[str, object] = {}
    for accumulation in (1, 2, 4):
        watch = Watch()
        fit(root, accumulation, [DANN(hidden=8), GradualUnfreezing(PHASES), RankSentinel(every_n_steps=1), watch])
        results[f"weights/{accumulation}"] = watch.weights
        results[f"facts/{accumulation}"] = watch.facts
    for accumulation in (1, 4) if WORLD > 1 else ():
        watch = Watch()
        strategy = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo")
        fit(root, accumulation, [DANN(hidden=8), GradualUnfreezing(PHASES), watch], strategy)
        results[f"sharded/{accumulation}"] = watch.weights
        results[f"sharded/facts/{accumulation}"] = watch.facts
    kinds: dict[str, Strategy | str] = {"adapters": "auto"}
    if WORLD > 1:
        kinds["sharded/adapters"] = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo")
    for kind, strategy in kinds.items():
        watch = Watch()
        fit(root, 1, [GradualUnfreezing(ADAPTER_PHASES), watch], strategy, adapters=True)
        results[kind], results[f"{kind}/facts"] = watch.weights, watch.facts
    if WORLD > 1:
        results["gradients"] = {name: sharded_gradients(name, out) for name in FAMILIES}
    try:
        fit(root, 1, [Naive(), RankSentinel(every_n_steps=1)])
        results["naive"] = ""
    except TrainingError as error:
        results["naive"] = str(error)
    torch.save(results, out / f"phases-{WORLD}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
