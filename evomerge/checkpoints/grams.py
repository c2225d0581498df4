"""Scalar products of checkpoints within parts of their tensors, in float64. No torch for tensors in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Checkpoint

BLOCK = 1 << 15
"""Entries of each checkpoint worked on at a time: few enough to stay in cache as float64."""

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def grams(checkpoints: Sequence[Checkpoint], parts: Sequence[tuple[str, int, int]]) -> NDArray[np.float64]:
    """Return the scalar products of every pair of checkpoints in each part.

    All weights are read once. Sums have a fixed order, whatever the number of threads.

    Args:
        checkpoints: They have the same tensors.
        parts: Name of a floating tensor, its first entry and the one behind its last; parts of one tensor
            follow each other.

    Returns:
        (parts, checkpoints, checkpoints).
    """
    found = np.zeros((len(parts), len(checkpoints), len(checkpoints)))
    wide = np.empty((len(checkpoints), BLOCK))
    held: tuple[str, list[Any]] = ("", [])
    for place, (name, start, stop) in enumerate(parts):
        if held[0] != name:
            held = (name, [_entries(checkpoint, name) for checkpoint in checkpoints])
        for first in range(start, stop, BLOCK):
            end = min(first + BLOCK, stop)
            block = wide[:, : end - first]
            for row, entries in zip(block, held[1], strict=True):
                row[:] = _floats(entries[first:end])
            found[place] += np.einsum("ic,jc->ij", block, block)
    return found


def _entries(checkpoint: Checkpoint, name: str) -> Any:
    """Return a tensor's entries as a flat array; bfloat16 as the upper halves of float32."""
    info = checkpoint.tensors[name]
    if checkpoint.is_stored(name) and info.dtype in STORED and info.nbytes:
        count = info.nbytes // np.dtype(STORED[info.dtype]).itemsize
        return np.memmap(info.file, STORED[info.dtype], "r", info.offset, count)
    return checkpoint.tensor(name).double().numpy().reshape(-1)


def _floats(entries: Any) -> Any:
    if entries.dtype == np.uint16:
        return (entries.astype(np.uint32) << 16).view(np.float32)
    return entries
