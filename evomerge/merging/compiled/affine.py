"""Weighted sums of tensors, their scalar products, and a look for numbers that are none."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.compiled.memory import READERS, WRITERS, addresses, as_bits, njit, summing
from evomerge.merging.compiled.threads import ALIGNED, spread


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """Write `sum_i factors[i] * tensors[i]` to `out`, each product and sum rounded to float32, in order.

    Args:
        tensors: At least one; of one shape, contiguous, any dtypes that `memory.takes`.
        factors: One for each.
        out: Contiguous; may be one of the tensors.
    """
    loop = _sum_loop(tuple(tensor.dtype for tensor in tensors), out.dtype)
    inputs, (target,) = addresses(*tensors), addresses(out)
    numbers = tuple(np.float32(factor) for factor in factors)
    spread(lambda start, stop: loop(inputs, numbers, target, start, stop), out.numel())


def dot(first: Tensor, second: Tensor) -> float:
    """Return the scalar product of two flat tensors, summed in float64 over fixed blocks."""
    loop = _dot_loop(first.dtype, second.dtype)
    (one, other), count = addresses(first, second), first.numel()
    sums = np.zeros(-(-count // ALIGNED))
    spread(lambda start, stop: loop(one, other, start, stop, sums), count)
    return math.fsum(sums)


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the scalar products of every pair of tensors, in one pass; see `dot`."""
    loop, size = _gram_loop(tuple(tensor.dtype for tensor in tensors)), len(tensors)
    inputs, count = addresses(*tensors), tensors[0].numel()
    sums = np.zeros((size * (size + 1) // 2, -(-count // ALIGNED)))
    spread(lambda start, stop: loop(inputs, start, stop, sums), count)
    products = iter(math.fsum(row) for row in sums)
    upper = [[0.0] * row + [next(products) for _ in range(row, size)] for row in range(size)]
    return [[upper[min(i, j)][max(i, j)] for j in range(size)] for i in range(size)]


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    loop, (start_of_tensor,), count = _count_loop(tensor.dtype), addresses(tensor), tensor.numel()
    counts = np.zeros(-(-count // ALIGNED), dtype=np.int64)
    spread(lambda start, stop: loop(start_of_tensor, start, stop, counts), count)
    return not counts.any()


@functools.cache
def _sum_loop(dtypes: tuple[torch.dtype, ...], out: torch.dtype) -> Any:
    term, write = _terms(dtypes), WRITERS[out]

    @njit
    def loop(inputs, factors, target, start, stop):
        for i in range(start, stop):
            write(target, i, term(inputs, factors, i))

    return loop


@functools.cache
def _terms(dtypes: tuple[torch.dtype, ...]) -> Any:
    """Return the sum over the first inputs at one index, as straight code without a loop over the inputs."""
    read, last = READERS[dtypes[-1]], len(dtypes) - 1
    if not last:

        @njit
        def first(inputs, factors, i):
            return factors[0] * read(inputs[0], i)

        return first
    before = _terms(dtypes[:-1])

    @njit
    def more(inputs, factors, i):
        return before(inputs, factors, i) + factors[last] * read(inputs[last], i)

    return more


@functools.cache
def _dot_loop(first: torch.dtype, second: torch.dtype) -> Any:
    product = _block_dot(first, second)

    @njit
    def loop(one, other, start, stop, sums):
        for block in range(start // ALIGNED, -(-stop // ALIGNED)):
            sums[block] = product(one, other, block * ALIGNED, min((block + 1) * ALIGNED, stop))

    return loop


@functools.cache
def _block_dot(first: torch.dtype, second: torch.dtype) -> Any:
    read_first, read_second = READERS[first], READERS[second]

    @summing
    def product(one, other, start, stop):
        total = 0.0
        for i in range(start, stop):
            total += np.float64(read_first(one, i)) * np.float64(read_second(other, i))
        return total

    return product


@functools.cache
def _count_loop(dtype: torch.dtype) -> Any:
    """Return a loop that counts the numbers that are not finite in each block."""
    read, exponent = READERS[dtype], np.uint32(0x7F800000)

    @njit
    def loop(inputs, start, stop, counts):
        for block in range(start // ALIGNED, -(-stop // ALIGNED)):
            count = 0
            for i in range(block * ALIGNED, min((block + 1) * ALIGNED, stop)):
                count += 1 if np.uint32(as_bits(read(inputs, i)) & exponent) == exponent else 0
            counts[block] = count

    return loop


@functools.cache
def _gram_loop(dtypes: tuple[torch.dtype, ...]) -> Any:
    size = len(dtypes)
    products = _products(dtypes, tuple((i, j) for i in range(size) for j in range(i, size)))

    @njit
    def loop(inputs, start, stop, sums):
        # Block by block, so that what one product has read is in cache for the next.
        for block in range(start // ALIGNED, -(-stop // ALIGNED)):
            products(inputs, block, block * ALIGNED, min((block + 1) * ALIGNED, stop), sums)

    return loop


@functools.cache
def _products(dtypes: tuple[torch.dtype, ...], pairs: tuple[tuple[int, int], ...]) -> Any:
    """Return a function that writes the products of one block to their rows of `sums`."""
    (i, j), row = pairs[-1], len(pairs) - 1
    product = _block_dot(dtypes[i], dtypes[j])
    if not row:

        @njit
        def first(inputs, block, start, stop, sums):
            sums[0, block] = product(inputs[0], inputs[0], start, stop)

        return first
    before = _products(dtypes, pairs[:-1])

    @njit
    def more(inputs, block, start, stop, sums):
        before(inputs, block, start, stop, sums)
        sums[row, block] = product(inputs[i], inputs[j], start, stop)

    return more
