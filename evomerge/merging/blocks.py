"""Working on a flat tensor in parts: small on a CPU, so that they stay in cache, large elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements worked on at a time on a CPU: few enough to stay in cache, enough to outweigh a call's cost."""

ELSEWHERE_ELEMENTS = 1 << 26
"""Elements at a time on other devices: more would need much memory for what lies between."""

ROW_ELEMENTS = 1 << 14
"""Elements that `total` adds up in one go: too few for torch to divide them among threads."""


def blocks(count: int, device: torch.device) -> Iterator[slice]:
    """Yield the parts of a flat tensor of `count` entries."""
    step = _step(device)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def block_buffers(count: int, like: Tensor) -> Tensor:
    """Return `count` float32 buffers for a block of a flat tensor, one in a row.

    They are made once for a tensor: memory that a CPU's allocator gets for every block costs more time than
    the arithmetic on it.
    """
    width = min(_step(like.device), like.numel())
    return torch.empty((count, width), dtype=torch.float32, device=like.device)


def in_float32(part: Tensor, cast: Tensor) -> Tensor:
    """Return a part of a tensor in float32, by way of the buffer `cast` if it is not already."""
    return part if part.dtype == torch.float32 else cast.copy_(part)


def total(values: Tensor) -> float:
    """Return the sum of a flat tensor in float64, the same whatever the number of threads."""
    if values.device.type != "cpu":
        return float(values.sum(dtype=torch.float64))
    whole = values.numel() // ROW_ELEMENTS * ROW_ELEMENTS
    sums = [float(values[whole:].sum(dtype=torch.float64))]
    for rows in torch.split(values[:whole].view(-1, ROW_ELEMENTS), 16):  # torch copies them to float64
        sums += rows.sum(dim=1, dtype=torch.float64).tolist()
    return math.fsum(sums)


def _step(device: torch.device) -> int:
    return BLOCK_ELEMENTS if device.type == "cpu" else ELSEWHERE_ELEMENTS
