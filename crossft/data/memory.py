"""Memories: a few rows of a domain that are rehearsed while another one is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossft.data.prepare import Prepared, first_rows
from crossft.data.sampler import Pool, quotas
from crossft.errors import ConfigError

__all__ = ["Memory", "memory_pools"]


@dataclass(frozen=True, eq=False)
class Memory:
    """Rows that stand in every training batch beside the mix.

    Attributes:
        rows: dataset rows by domain id.
        share: of each micro-batch; the mix has the rest.
        labeled: whether their labels train.
    """

    rows: Mapping[int, NDArray[np.int64]]
    share: float
    labeled: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ConfigError(f"share={self.share} must be between 0 and 1: the part of each batch that is rehearsed")
        if not any(len(rows) for rows in self.rows.values()):
            raise ConfigError("a memory without rows: set data.source to a domain with training rows")


def memory_pools(
    memories: Mapping[str, Memory],
    prepared: Sequence[Prepared],
    batch_size: int,
    lengths: NDArray[np.int64] | None = None,
) -> tuple[tuple[Pool, ...], int]:
    """The pools of all memories (a pass over them never makes an epoch), and the rows of a batch left for the mix.

    Args:
        memories: by method.
        prepared: all domains.
        batch_size: rows of a micro-batch of one process.
        lengths: token count of every dataset row, or None.

    Raises:
        ConfigError: a domain of a memory gets no row, or the mix gets none.
    """
    found: list[Pool] = []
    for name, memory in sorted(memories.items()):
        parts = [(d, np.sort(rows)) for d, rows in sorted(memory.rows.items()) if len(rows)]
        each = quotas([len(rows) for _, rows in parts], max(1, round(memory.share * batch_size)))
        for (domain, rows), quota in zip(parts, each):
            p, start = prepared[domain], first_rows(prepared)[domain]
            known = p.labeled[rows - start]
            if memory.labeled and not known.all():
                raise ConfigError(f"methods.{name}: rows of domain {p.domain.name!r} in its memory have no label")
            if quota == 0:
                raise ConfigError(
                    f"methods.{name}: data.batch_size={batch_size} leaves no row for domain {p.domain.name!r} of its "
                    "memory; raise the batch size or the memory's share"
                )
            own = None if lengths is None else lengths[rows]
            pool_name = f"{p.domain.name}/memory/{name}"
            found.append(Pool(pool_name, domain, memory.labeled, rows, quota, lengths=own, leads=False))
    rest = batch_size - sum(pool.quota for pool in found)
    if found and rest < 1:
        raise ConfigError(
            f"data.batch_size={batch_size} is filled by memories ({', '.join(sorted(memories))}); raise the batch size "
            "or lower their share"
        )
    return tuple(found), rest
