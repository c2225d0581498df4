"""The order of a tensor's magnitudes, as a table small enough to hold for every tensor of every source."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.merging import torched
from evomerge.merging.compiled import memory
from evomerge.merging.compiled.order import entry_at, magnitude_order
from evomerge.merging.keeps import ABOVE_ALL, ALL_ABOVE, NONE_ABOVE, Cut

RUNGS = 1 << 13
"""Ranks in the table, evenly over all entries, and as many again over the largest sixteenth of them."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """The entries at fixed ranks, from the largest magnitude down.

    Up to 16,384 entries every rank is there; of larger tensors a rank is met to 1 in 16,384 entries, and to 1
    in 262,144 among the largest sixteenth.

    Attributes:
        count: Number of entries.
        bits: Bits of the magnitude at each rank of `ranks_of(count)` but the first, which is 0; int32.
        fractions: Fraction of its index, times 2**32; int64.
    """

    count: int
    bits: Tensor
    fractions: Tensor

    def cut(self, rank: int) -> Cut:
        """Return the cut that the entries up to the rung nearest to a rank lie above, and no other."""
        place = _place_of(rank, self.count)
        if place in (0, len(self.bits)):
            return _end(place)
        return Cut(int(self.bits.numpy()[place - 1]), int(self.fractions.numpy()[place - 1]) + 1)


@functools.lru_cache(maxsize=256)
def ranks_of(count: int) -> npt.NDArray[np.int64]:
    """Return the ranks in the table of a tensor of `count` entries, ascending from 0 to `count`."""
    if count <= 2 * RUNGS:
        return np.arange(count + 1)
    steps = np.arange(RUNGS + 1)
    return np.unique(np.concatenate([steps * count // RUNGS, steps * (count // 16) // RUNGS]))


def rung_of(rank: int, count: int) -> int:
    """Return the rank in the table that is nearest to a rank."""
    return int(ranks_of(count)[_place_of(rank, count)])


def _place_of(rank: int, count: int) -> int:
    """Return the index in the table of the rank that is nearest to a rank."""
    ranks = ranks_of(count)
    if rank <= 0 or rank >= count:
        return 0 if rank <= 0 else len(ranks) - 1
    right = int(ranks.searchsorted(rank))
    left = max(0, right - 1)
    return right if ranks[right] - rank <= rank - ranks[left] else left


def _end(rank: int) -> Cut:
    return ALL_ABOVE if rank > 0 else NONE_ABOVE


def cut_at(base: Tensor, tensor: Tensor, rank: int) -> Cut:
    """Return what `ladder_of(base, tensor).cut(rank)` does, without the ladder: faster for a single rank."""
    count = tensor.numel()
    rung = rung_of(rank, count)
    if not 0 < rung < count:
        return _end(rung)
    if not memory.takes(base, tensor):
        return ladder_of(base, tensor).cut(rank)
    entry = entry_at(base, tensor, rung)
    return Cut(ABOVE_ALL - (entry >> 32), (entry & 0xFFFFFFFF) + 1)


def ladder_of(base: Tensor, tensor: Tensor) -> Ladder:
    """Return the ladder of a source's delta; memory: 8 bytes per entry while it is made."""
    count = tensor.numel()
    places = ranks_of(count)[1:] - 1
    if memory.takes(base, tensor):
        order = magnitude_order(base, tensor)
        order.sort()
        rungs = order[places]
    else:
        sorted_order = torched.magnitude_order(base, tensor).sort().values
        rungs = sorted_order[torch.from_numpy(places).to(tensor.device)].cpu().numpy().view(np.uint64)
    bits = (ABOVE_ALL - (rungs >> np.uint64(32))).astype(np.int32)
    fractions = (rungs & np.uint64(2**32 - 1)).astype(np.int64)
    return Ladder(count, torch.from_numpy(bits), torch.from_numpy(fractions))


def common_cut(ladders: Sequence[Ladder], rank: int) -> Cut:
    """Return the cut that about `rank` entries of several tensors together lie above."""
    bits = np.concatenate([ladder.bits.numpy() for ladder in ladders])
    fractions = np.concatenate([ladder.fractions.numpy() for ladder in ladders])
    masses = np.concatenate([np.diff(ranks_of(ladder.count)) for ladder in ladders])
    if rank <= 0 or rank >= masses.sum():
        return _end(rank)
    order = np.lexsort((fractions, -bits))
    found = order[np.searchsorted(np.cumsum(masses[order]), rank)]
    return Cut(int(bits[found]), int(fractions[found]) + 1)
