"""The Triton kernels of `fused`."""

from __future__ import annotations

import triton
import triton.language as tl

from evomerge.merging.keeps import DRAWS, GOLDEN, SMALLEST_DIVISOR

NUMBERS = tl.constexpr(11)
"""Real numbers that a keep is handed to a kernel as."""

_GOLDEN, _ABS, _SIGN = tl.constexpr(GOLDEN), tl.constexpr(0x7FFFFFFF), tl.constexpr(0x80000000)
_MIX_1, _MIX_2 = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)
_DRAWS, _SMALLEST = tl.constexpr(float(DRAWS)), tl.constexpr(SMALLEST_DIVISOR)


@triton.jit
def sum_kernel(inputs, factors, target, count, BLOCK: tl.constexpr):
    """Write the sum of the inputs times their factors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.load(inputs[0] + i, inside).to(tl.float32) * factors[0]
    for k in tl.static_range(1, len(inputs)):
        total += tl.load(inputs[k] + i, inside).to(tl.float32) * factors[k]
    tl.store(target + i, total.to(target.dtype.element_ty), inside)


@triton.jit
def _draw(key, other_key, i):
    """Return the 24-bit draw of an entry; see `draws.uniform_codes`."""
    code = i ^ key
    code = (code ^ (code >> 16)) * _MIX_1
    code = (code ^ (code >> 13)) * _MIX_2
    code = code ^ (code >> 16)
    code = code ^ other_key
    code = (code ^ (code >> 16)) * _MIX_1
    code = (code ^ (code >> 13)) * _MIX_2
    code = code ^ (code >> 16)
    return code >> 8


@triton.jit
def _word(high, low):
    """Return a 32-bit word from its halves."""
    return (tl.cast(high, tl.uint32) << 16) | tl.cast(low, tl.uint32)


@triton.jit
def _above(delta, i, bits, share):
    """Return whether an entry lies above a cut."""
    size = delta.to(tl.uint32, bitcast=True) & _ABS
    return size + (i * _GOLDEN < share).to(tl.uint32) > bits


@triton.jit
def _turned(piece, sign):
    """Return a piece that has the sign as a positive number, any other as 0."""
    turned = (piece.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return tl.where(turned > 0, turned, 0.0)


@triton.jit
def thinned_kernel(
    base,
    inputs,
    codes,
    numbers,
    weights,
    scale,
    tie,
    target,
    count,
    KIND: tl.constexpr,
    VOTES: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the base plus the merged, thinned deltas; `numbers` are the keeps as `fused` packs them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    i = at.to(tl.uint32)
    at_base = tl.load(base + at, inside, 0.0).to(tl.float32)
    pieces = ()
    for k in tl.static_range(len(inputs)):
        delta = tl.load(inputs[k] + at, inside, 0.0).to(tl.float32) - at_base
        piece = numbers[NUMBERS * k] * delta
        first = _word(numbers[NUMBERS * k + 3], numbers[NUMBERS * k + 4])
        second = _word(numbers[NUMBERS * k + 5], numbers[NUMBERS * k + 6])
        third = _word(numbers[NUMBERS * k + 7], numbers[NUMBERS * k + 8])
        if KIND == 0:
            kept = _above(delta, i, first, second)
            kept = kept & (
                _above(delta, i, third, _word(numbers[NUMBERS * k + 9], numbers[NUMBERS * k + 10])) == 0
            )
        else:
            draw = _draw(first, second, i)
            if KIND == 1:
                kept = draw < third
            else:
                code = tl.load(codes[k] + at, inside, 0).to(tl.float32)
                probability = numbers[NUMBERS * k + 1] + numbers[NUMBERS * k + 2] * code
                kept = draw.to(tl.float32) < probability * _DRAWS
                piece = tl.where(third != 0, tl.div_rn(piece, probability), piece)
        pieces = pieces + (tl.where(kept, piece, 0.0),)  # noqa: RUF005 - Triton knows no unpacking
    merged = pieces[0]
    for k in tl.static_range(1, len(inputs)):
        merged += pieces[k]
    if VOTES:
        vote = merged
        sign = tl.where(vote == 0, tie + 0.0 * vote, vote).to(tl.uint32, bitcast=True) & _SIGN
        merged = _turned(pieces[0], sign)
        for k in tl.static_range(1, len(inputs)):
            merged += _turned(pieces[k], sign)
        if DIVIDES:
            divisor = tl.where(_turned(pieces[0], sign) > 0, weights[0], 0.0)
            for k in tl.static_range(1, len(inputs)):
                divisor += tl.where(_turned(pieces[k], sign) > 0, weights[k], 0.0)
            merged = tl.div_rn(merged, tl.where(tl.abs(divisor) >= _SMALLEST, divisor, 1.0))
        elected = (merged.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        merged = tl.where(vote == vote, elected, vote)
    tl.store(target + at, (at_base + scale * merged).to(target.dtype.element_ty), inside)
