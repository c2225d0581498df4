"""Thinned deltas in one pass: what each source keeps, the election of signs, and the sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.compiled.memory import (
    READERS,
    WRITERS,
    addresses,
    as_bits,
    as_float,
    njit,
    read_codes,
    summing,
)
from evomerge.merging.compiled.threads import ALIGNED, spread
from evomerge.merging.keeps import DRAWS, GOLDEN, SMALLEST_DIVISOR, Band, Draw, Election, Keep

_ABS, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
_GOLDEN, _NOTHING, _ONE, _NONE = np.uint32(GOLDEN), np.float32(0), np.uint32(1), np.uint32(0)
_8, _13, _16, _32 = np.uint32(8), np.uint32(13), np.uint32(16), np.uint64(32)
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SMALLEST, _UNIT, _DRAWS = np.float32(SMALLEST_DIVISOR), np.float32(1), np.float32(DRAWS)


class _Band(NamedTuple):
    factor: np.float32
    low: np.uint32
    low_share: np.uint32
    high: np.uint32
    high_share: np.uint32


class _Draw(NamedTuple):
    factor: np.float32
    key: np.uint32
    other_key: np.uint32
    limit: np.uint32


class _Graded(NamedTuple):
    factor: np.float32
    key: np.uint32
    other_key: np.uint32
    codes: np.int64
    lowest: np.float32
    step: np.float32
    inverse: np.uint32


def _packed(keep: Keep) -> Any:
    """Return a keep as numbers of the widths that the loops work with."""
    factor, bits = np.float32(keep.factor), np.uint32
    if isinstance(keep, Band):
        low, high = keep.low, keep.high
        return _Band(factor, bits(low.bits), bits(low.share), bits(high.bits), bits(high.share))
    keys = bits(keep.keys[0]), bits(keep.keys[1])
    if isinstance(keep, Draw):
        return _Draw(factor, *keys, bits(keep.limit))
    (codes,) = addresses(keep.codes)
    lowest, step = np.float32(keep.lowest), np.float32(keep.step)
    return _Graded(factor, *keys, np.int64(codes), lowest, step, bits(keep.inverse))


def merge_thinned(
    base: Tensor,
    tensors: Sequence[Tensor],
    keeps: Sequence[Keep],
    weights: Sequence[float],
    election: Election,
    scale: float,
    out: Tensor,
) -> None:
    """Write `base + scale * merged delta` to `out`.

    Args:
        base: The base's tensor.
        tensors: The sources' tensors, of its shape, contiguous.
        keeps: One for each, all of one kind.
        weights: What is divided by, if anything is.
        election: How the deltas become one.
        scale: Factor of the merged delta.
        out: Contiguous.
    """
    dtypes = tuple(tensor.dtype for tensor in tensors)
    packed = tuple(_packed(keep) for keep in keeps)
    loop = _merge_loop(
        base.dtype, dtypes, type(packed[0]).__name__, election.votes, election.divides, out.dtype
    )
    (start_of_base, *inputs), (target,) = addresses(base, *tensors), addresses(out)
    numbers = (tuple(inputs), packed, tuple(np.float32(weight) for weight in weights))
    tie, factor = np.uint32(0 if election.tie >= 0 else 0x80000000), np.float32(scale)
    spread(lambda start, stop: loop(start_of_base, *numbers, tie, factor, target, start, stop), out.numel())


def kept_norm(base: Tensor, tensor: Tensor, keep: Keep, power: int) -> float:
    """Return the sum of `abs(entry) ** power` (1 or 2) over what is kept of a source's delta."""
    packed = _packed(keep)
    loop = _norm_loop(base.dtype, tensor.dtype, type(packed).__name__, power)
    (first, second), count = addresses(base, tensor), tensor.numel()
    sums = np.zeros(-(-count // ALIGNED))
    spread(lambda start, stop: loop(first, second, packed, start, stop, sums), count)
    return math.fsum(sums)


def elected_signs(base: Tensor, tensors: Sequence[Tensor], keeps: Sequence[Keep]) -> int:
    """Return how many more entries elect plus than minus; entries whose sum is zero elect neither."""
    packed = tuple(_packed(keep) for keep in keeps)
    loop = _signs_loop(base.dtype, tuple(tensor.dtype for tensor in tensors), type(packed[0]).__name__)
    (start_of_base, *inputs), count = addresses(base, *tensors), base.numel()
    sums = np.zeros(-(-count // ALIGNED), dtype=np.int64)
    numbers = (tuple(inputs), packed)
    spread(lambda start, stop: loop(start_of_base, *numbers, start, stop, sums), count)
    return int(sums.sum())


@njit
def _draw(key, other_key, i):
    """Return the 24-bit draw of an entry; see `draws.uniform_codes`, which it agrees with."""
    code = np.uint32(i)
    for word in (key, other_key):
        code = np.uint32(code ^ word)
        code = np.uint32(np.uint32(code ^ np.uint32(code >> _16)) * _MIX_1)
        code = np.uint32(np.uint32(code ^ np.uint32(code >> _13)) * _MIX_2)
        code = np.uint32(code ^ np.uint32(code >> _16))
    return np.uint32(code >> _8)


@njit
def _piece_of_band(keep, delta, i):
    bits = np.uint32(as_bits(delta) & _ABS)
    fraction = np.uint32(np.uint32(i) * _GOLDEN)
    low = np.uint32(bits + (_ONE if fraction < keep.low_share else _NONE)) > keep.low
    high = np.uint32(bits + (_ONE if fraction < keep.high_share else _NONE)) > keep.high
    return keep.factor * delta if low & (not high) else _NOTHING


@njit
def _piece_of_draw(keep, delta, i):
    return keep.factor * delta if _draw(keep.key, keep.other_key, i) < keep.limit else _NOTHING


@njit
def _piece_graded(keep, delta, i):
    probability = keep.lowest + keep.step * np.float32(read_codes(keep.codes, i))
    kept = np.float32(_draw(keep.key, keep.other_key, i)) < probability * _DRAWS
    divisor = probability if keep.inverse else _UNIT
    return keep.factor * delta / divisor if kept else _NOTHING


_PIECES: dict[str, Any] = {"_Band": _piece_of_band, "_Draw": _piece_of_draw, "_Graded": _piece_graded}


@functools.cache
def _pieces(dtypes: tuple[torch.dtype, ...], kind: str) -> Any:
    """Return a function that gives every source's weighted, thinned delta at one index, as a tuple."""
    read, piece, last = READERS[dtypes[-1]], _PIECES[kind], len(dtypes) - 1
    if not last:

        @njit
        def first(base, inputs, keeps, i):
            return (piece(keeps[0], read(inputs[0], i) - base, i),)

        return first
    before = _pieces(dtypes[:-1], kind)

    @njit
    def more(base, inputs, keeps, i):
        return (
            *before(base, inputs, keeps, i),
            piece(keeps[last], read(inputs[last], i) - base, i),
        )

    return more


@functools.cache
def _total(count: int) -> Any:
    """Return the sum of a tuple of `count` numbers, in order."""
    last = count - 1
    if not last:
        return njit(lambda pieces: pieces[0])
    before = _total(last)
    return njit(lambda pieces: before(pieces) + pieces[last])


@functools.cache
def _agreeing(count: int) -> Any:
    """Return the sum of those of `count` pieces that have a sign, made positive."""
    last = count - 1

    @njit
    def one(pieces, sign):
        turned = as_float(np.uint32(as_bits(pieces[last]) ^ sign))
        return turned if turned > _NOTHING else _NOTHING

    if not last:
        return one
    before = _agreeing(last)
    return njit(lambda pieces, sign: before(pieces, sign) + one(pieces, sign))


@functools.cache
def _divisor(count: int) -> Any:
    """Return the sum of the weights of those of `count` pieces that have a sign."""
    last = count - 1

    @njit
    def one(pieces, weights, sign):
        turned = as_float(np.uint32(as_bits(pieces[last]) ^ sign))
        return weights[last] if turned > _NOTHING else _NOTHING

    if not last:
        return one
    before = _divisor(last)
    return njit(lambda pieces, weights, sign: before(pieces, weights, sign) + one(pieces, weights, sign))


@functools.cache
def _combined(count: int, votes: bool, divides: bool) -> Any:
    """Return the merged delta of `count` pieces at one index."""
    total, agreeing, divisor = _total(count), _agreeing(count), _divisor(count)

    @njit
    def combined(pieces, weights, tie):
        vote = total(pieces)
        if not votes:
            return vote
        sign = tie if vote == _NOTHING else np.uint32(as_bits(vote) & _SIGN)
        merged = agreeing(pieces, sign)
        if vote != vote:  # a number that is none has no sign, and must not vanish
            return vote
        if divides:
            by = divisor(pieces, weights, sign)
            merged = merged / (by if abs(by) >= _SMALLEST else _UNIT)
        return as_float(np.uint32(as_bits(merged) ^ sign))

    return combined


@functools.cache
def _merge_loop(
    base: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    kind: str,
    votes: bool,
    divides: bool,
    out: torch.dtype,
) -> Any:
    read, write, pieces = READERS[base], WRITERS[out], _pieces(dtypes, kind)
    combined = _combined(len(dtypes), votes, divides)

    @njit
    def loop(start_of_base, inputs, keeps, weights, tie, scale, target, start, stop):
        for i in range(start, stop):
            at_base = read(start_of_base, i)
            delta = combined(pieces(at_base, inputs, keeps, i), weights, tie)
            write(target, i, at_base + scale * delta)

    return loop


@functools.cache
def _norm_loop(base: torch.dtype, dtype: torch.dtype, kind: str, power: int) -> Any:
    read_base, read, piece = READERS[base], READERS[dtype], _PIECES[kind]

    @summing
    def loop(first, second, keep, start, stop, sums):
        for block in range(start // ALIGNED, -(-stop // ALIGNED)):
            total = 0.0
            for i in range(block * ALIGNED, min((block + 1) * ALIGNED, stop)):
                size = np.float64(abs(piece(keep, read(second, i) - read_base(first, i), i)))
                total += size * size if power == 2 else size
            sums[block] = total

    return loop


@functools.cache
def _signs_loop(base: torch.dtype, dtypes: tuple[torch.dtype, ...], kind: str) -> Any:
    read, pieces, total = READERS[base], _pieces(dtypes, kind), _total(len(dtypes))

    @njit
    def loop(start_of_base, inputs, keeps, start, stop, sums):
        for block in range(start // ALIGNED, -(-stop // ALIGNED)):
            signs = 0
            for i in range(block * ALIGNED, min((block + 1) * ALIGNED, stop)):
                vote = total(pieces(read(start_of_base, i), inputs, keeps, i))
                signs += 1 if vote > _NOTHING else (-1 if vote < _NOTHING else 0)
            sums[block] = signs

    return loop
