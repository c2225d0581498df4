"""The order of a delta's entries by magnitude, and single places in it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.compiled.memory import READERS, addresses, as_bits, njit
from evomerge.merging.compiled.threads import spread
from evomerge.merging.keeps import ABOVE_ALL, GOLDEN

_ABS, _GOLDEN, _32 = np.uint32(ABOVE_ALL), np.uint32(GOLDEN), np.uint64(32)


def magnitude_order(base: Tensor, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a number for each entry of a source's delta, smaller the earlier it comes by magnitude.

    The upper half is `ABOVE_ALL` minus the magnitude's bits, the lower half the fraction of the index.
    """
    loop = _order_loop(base.dtype, tensor.dtype)
    order = np.empty(tensor.numel(), dtype=np.uint64)
    first, second = addresses(base, tensor)
    spread(lambda start, stop: loop(first, second, start, stop, order), order.size)
    return order


def entry_at(base: Tensor, tensor: Tensor, rank: int) -> int:
    """Return the `rank`-th smallest number of `magnitude_order`, from 1 on, in one pass without a sort.

    A sample says between which numbers it lies almost surely; those are counted, gathered, and searched.
    """
    loop = _gather_loop(base.dtype, tensor.dtype)
    (first, second), count = addresses(base, tensor), tensor.numel()

    def between(low: int, high: int) -> tuple[int, Any]:
        found: list[tuple[int, Any]] = []

        def gather(start: int, stop: int) -> None:
            inside = np.empty(stop - start, dtype=np.uint64)
            below, number = loop(first, second, start, stop, np.uint64(low), np.uint64(high), inside)
            found.append((below, inside[:number].copy()))

        spread(gather, count)
        return sum(below for below, _ in found), np.concatenate([inside for _, inside in found])

    step = max(1, count // SAMPLE)
    sample = np.sort(_sample_loop(base.dtype, tensor.dtype)(first, second, count, step))
    middle, margin = rank * sample.size // count, MARGIN
    low = int(sample[middle - margin]) if middle >= margin else 0
    high = int(sample[middle + margin]) if middle + margin < sample.size else 2**64 - 1
    below, inside = between(low, high)
    if not below < rank <= below + inside.size:
        below, inside = between(0, 2**64 - 1)
    return int(np.partition(inside, rank - 1 - below)[rank - 1 - below])


SAMPLE = 1 << 16
"""Entries in the sample of `entry_at`."""

MARGIN = 1 << 10
"""Entries of the sample on either side: eight standard deviations of a random sample's count."""


@njit
def _order(delta, i):
    bits = np.uint32(as_bits(delta) & _ABS)
    fraction = np.uint32(np.uint32(i) * _GOLDEN)
    return (np.uint64(np.uint32(_ABS - bits)) << _32) | np.uint64(fraction)


@functools.cache
def _order_loop(base: torch.dtype, dtype: torch.dtype) -> Any:
    read_base, read = READERS[base], READERS[dtype]

    @njit
    def loop(first, second, start, stop, order):
        for i in range(start, stop):
            order[i] = _order(read(second, i) - read_base(first, i), i)

    return loop


@functools.cache
def _gather_loop(base: torch.dtype, dtype: torch.dtype) -> Any:
    """Return a loop that counts the numbers below `low` and gathers those up to `high`."""
    read_base, read = READERS[base], READERS[dtype]

    @njit
    def loop(first, second, start, stop, low, high, inside):
        below, found = 0, 0
        numbers = np.empty(_GROUP, dtype=np.uint64)
        for group in range(start, stop, _GROUP):
            size = min(_GROUP, stop - group)
            for j in range(size):
                i = group + j
                numbers[j] = _order(read(second, i) - read_base(first, i), i)
            hits = 0
            for j in range(size):
                below += 1 if numbers[j] < low else 0
                hits += 1 if low <= numbers[j] <= high else 0
            # Few groups have any, and vectors can tell that much faster than they can gather.
            if hits:
                for j in range(size):
                    if low <= numbers[j] <= high:
                        inside[found] = numbers[j]
                        found += 1
        return below, found

    return loop


_GROUP = 32


@functools.cache
def _sample_loop(base: torch.dtype, dtype: torch.dtype) -> Any:
    read_base, read = READERS[base], READERS[dtype]

    @njit
    def loop(first, second, count, step):
        sample = np.empty((count + step - 1) // step, dtype=np.uint64)
        for place in range(sample.size):
            i = place * step
            sample[place] = _order(read(second, i) - read_base(first, i), i)
        return sample

    return loop
