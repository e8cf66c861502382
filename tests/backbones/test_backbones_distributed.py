"""Two gloo processes against one: gradients of 14 timm families and 9 text architectures, and BatchNorm statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from backbones.tiny_models import images, noised, text_folder, tiny_text, tiny_timm, tokens
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from crossft.backbones import Backbone, apply_batchnorm_policy, batch_norms, reestimate_, set_domains

VISION = (
    "test_vit",
    "test_resnet",
    "swin_tiny_patch4_window7_224",
    "test_efficientnet",
    "regnetx_002",
    "densenet121",
    "vgg11",
    "test_convnext",
    "test_coatnet",
    "test_byobnet",
    "focalnet_tiny_srf",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "test_mambaout",
)
TEXT = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert", "albert", "t5")
CASES = [(name, False) for name in (*VISION, *TEXT)] + [("test_resnet", True), ("bert", True)]


class Net(nn.Module):
    """A backbone under DDP; captures a stage where it can, as attached terms do."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        second = backbone.stages[1].name
        self.capture = [second] if backbone.can_start_from(second) is None else []

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        out = self.backbone(inputs, self.capture)
        return (out.features**2).mean() + sum((v**2).mean() for v in out.stages.values())


def build(name: str, checkpoint_grads: bool, folder: Path) -> Backbone:
    options: dict[str, Any] = {"checkpoint_grads": checkpoint_grads}
    net = tiny_timm(name, **options) if name in VISION else tiny_text(name, folder / name, **options)
    return noised(net).eval()  # no dropout, frozen batch statistics: processes and one must agree


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model(inputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def half(inputs: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    failed = []
    for name, checkpoint_grads in CASES:
        backbone = build(name, checkpoint_grads, Path(folder))
        inputs = images(backbone, 4) if name in VISION else tokens(4)
        expected = gradients(Net(build(name, checkpoint_grads, Path(folder))), inputs)
        got = gradients(DistributedDataParallel(Net(backbone)), half(inputs, rank))
        if len(got) != len(expected) or len(got) != len(list(backbone.parameters())):
            failed.append(f"{name} {checkpoint_grads}: {len(got)} gradients, not {len(expected)}")
        elif not all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, expected)):
            failed.append(f"{name} {checkpoint_grads}: gradients differ")
    failed += reestimated(rank) + with_domains(rank)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


def reestimated(rank: int) -> list[str]:
    """Two batches here, one there: as if one process had seen all three."""
    net = tiny_timm("test_resnet").eval()
    conv, first = net.model.conv1[0], batch_norms(net)[0]
    batches = [images(net, 4, seed) for seed in range(3)]
    inputs = [conv(batch["pixel_values"]).detach() for batch in batches]
    reestimate_(net, batches[:2] if rank == 0 else batches[2:])
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    right = torch.allclose(first.running_mean, mean, atol=1e-5) and torch.allclose(first.running_var, var, atol=1e-5)
    sums = torch.stack([layer.running_var.sum() for layer in batch_norms(net)])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    equal = torch.equal(lowest, highest)
    return [] if right and equal else [f"reestimate_: right {right}, equal on both processes {equal}"]


def with_domains(rank: int) -> list[str]:
    """A process that has no row of a domain still reduces every gradient."""
    net = tiny_timm("test_resnet").train()
    apply_batchnorm_policy(net, "per_domain", 2)
    set_domains(net, torch.tensor([0, 0, 0]) if rank == 0 else torch.tensor([0, 1, 1]))
    got = gradients(DistributedDataParallel(Net(net)), images(net, 3, seed=rank))
    total = torch.stack([g.sum() for g in got])
    lowest, highest = total.clone(), total.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    complete = len(got) == len(list(net.parameters()))
    return [] if complete and torch.equal(lowest, highest) else ["per_domain: gradients differ between processes"]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    for kind in TEXT:
        text_folder(kind, tmp_path / kind)
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)] == [[], []]
