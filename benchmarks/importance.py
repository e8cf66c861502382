"""What importance and its penalty cost: the Fisher pass against a loop over rows, EWC's step against the plain one.

    python benchmarks/importance.py [--rows 16] [--size 64] [--tokens 96] [--pairs 3] [--threads 1]

Both are measured on the networks that ship in packages, in processor time. The loop is what libraries do that get the
Fisher right: one row, one backward a label, squares added up; under the most likely label (argmax), and in the
expectation over all labels (exact), which is what EWC reads by default. The two take turns. Bounds: the pass at least
3 times as fast as the loop, where that is possible; a step with EWC (or L2-SP) at most 5 % longer than one without.

It is not possible where one row alone keeps the processor busy: nothing that needs a forward and a backward beats the
plain forward and backward of a batch, whose time a row is printed as the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossft.backbones import Backbone, Timm, Transformer
from crossft.callbacks.retention.l2sp import L2SPPenalty
from crossft.callbacks.retention.quadratic import QuadraticPenalty
from crossft.functional.importance import fisher_cotangents
from crossft.functional.per_sample import GradientPowers

CLASSES, CHUNK = 7, 16
MIN_SPEEDUP, MAX_OVERHEAD = 3.0, 0.05
Rows = dict[str, Tensor]


class Scored(nn.Module):
    """A backbone with a linear head."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.num_features, CLASSES)

    def forward(self, rows: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.backbone(rows).features)


def by_loop(model: Scored, rows: Rows, count: int, labels: str) -> list[Tensor]:
    """Squared gradients, one row and one label at a time: the most likely label, or every label by its probability."""
    parameters = list(model.backbone.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for i in range(count):
        z = model({k: v[i : i + 1] for k, v in rows.items()})
        p_label = z.detach().softmax(1)[0].tolist()
        for label in range(CLASSES) if labels == "exact" else [int(z.argmax(1))]:
            model.zero_grad()
            F.cross_entropy(z, torch.tensor([label])).backward(retain_graph=labels == "exact")
            share = p_label[label] if labels == "exact" else 1.0
            for s, p in zip(sums, parameters, strict=True):
                if p.grad is not None:
                    s.addcmul_(p.grad, p.grad, value=share)
    model.zero_grad()
    return sums


def at_once(model: Scored, rows: Rows, count: int, labels: str) -> list[Tensor]:
    """The same by closed forms, ``CHUNK`` rows at a time; without their check on the first two rows, once a pass."""
    powers = GradientPowers(model, {n: p for n, p in model.named_parameters() if n.startswith("backbone.")})
    powers.slow = frozenset()
    for start in range(0, count, CHUNK):
        part = {k: v[start : start + CHUNK] for k, v in rows.items()}
        powers.add(part, lambda z: fisher_cotangents(z, labels=labels))  # type: ignore[arg-type]
    return list(powers.sums.values())


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def fisher(name: str, model: Scored, rows: Rows, pairs: int, labels: str) -> float:
    """Print both times; return the ratio of medians as a share of its bound."""
    count = len(next(iter(rows.values())))
    model.eval()
    loop, fast = by_loop(model, rows, count, labels), at_once(model, rows, count, labels)
    largest = max(float(a.norm()) for a in loop)
    off = max(float((a - b).norm() / (a.norm() + 1e-6 * largest)) for a, b in zip(loop, fast, strict=True))
    times = [
        (timed(lambda: by_loop(model, rows, count, labels)), timed(lambda: at_once(model, rows, count, labels)))
        for _ in range(pairs)
    ]
    slow, quick = (statistics.median(t) for t in zip(*times, strict=True))
    parameters = list(model.backbone.parameters())
    turns = CLASSES if labels == "exact" else 1

    def plain() -> None:
        out = model(rows).logsumexp(1).sum()
        for turn in range(turns):
            torch.autograd.grad(out, parameters, allow_unused=True, retain_graph=turn + 1 < turns)

    limit = slow / statistics.median(timed(plain) for _ in range(pairs))
    print(
        f"{name:18} {labels:6} loop {slow / count * 1e3:7.1f} ms a row   at once {quick / count * 1e3:7.1f} ms a row   "
        f"{slow / quick:4.1f} times, limit {limit:.1f}   (largest relative difference of a layer {off:.0e})",
        flush=True,
    )
    return slow / quick / MIN_SPEEDUP


def overhead(name: str, model: Scored, rows: Rows, pairs: int) -> float:
    """Print the extra time of a training step with each penalty; return the largest share."""
    model.train()
    parameters = dict(model.backbone.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ewc = QuadraticPenalty(parameters)
    ewc.fill({n: torch.rand_like(p) for n, p in parameters.items()}, {})
    penalties = {"EWC": ewc, "L2-SP": L2SPPenalty(list(parameters.values()), [], 0.0)}

    def step() -> None:
        optimizer.zero_grad()
        model(rows).logsumexp(1).mean().backward()
        optimizer.step()

    step()
    plain = statistics.median(timed(step) for _ in range(pairs))
    worst = 0.0
    for label, penalty in penalties.items():
        extra = statistics.median(timed(lambda p=penalty: p.add_grad_(1.0)) for _ in range(4 * pairs))
        worst = max(worst, extra / plain)
        print(
            f"{name:18} step {plain * 1e3:7.1f} ms   {label:6} {extra * 1e3:6.2f} ms more: {extra / plain:.1%}",
            flush=True,
        )
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    words = torch.randint(5, 9000, (args.rows, args.tokens))
    cases = {
        "EfficientNet-lite0": (
            Scored(Timm("packaged:efficientnet_lite0")),
            {"pixel_values": torch.randn(args.rows, 3, args.size, args.size)},
        ),
        "MiniLM": (
            Scored(Transformer("packaged:minilm")),
            {"input_ids": words, "attention_mask": torch.ones_like(words)},
        ),
    }
    speed = [fisher(n, m, rows, args.pairs, labels) for n, (m, rows) in cases.items() for labels in ("argmax", "exact")]
    extra = [overhead(name, model, rows, args.pairs) for name, (model, rows) in cases.items()]
    holds = min(speed) >= 1.0 and max(extra) <= MAX_OVERHEAD
    print(
        f"\nbounds (at least {MIN_SPEEDUP:.0f} times; at most {MAX_OVERHEAD:.0%}): {'hold' if holds else 'do not hold'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
