"""The loops of `merging.compiled` as Triton kernels for a GPU: one launch, one pass over the inputs each.

They round every product, sum and quotient as the compiled loops do, so that the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from evomerge.merging.fused_kernels import sum_kernel, thinned_kernel
from evomerge.merging.keeps import Band, Draw, Election, Graded, Keep

BLOCK = 2048
"""Entries that one program of a kernel merges."""
WARPS = 8
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
KINDS = {Band: 0, Draw: 1, Graded: 2}
MOST_INPUTS = 16
"""More than in any recipe so far; the tests go up to it."""


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can read and write these tensors."""
    return len(tensors) <= MOST_INPUTS and all(t.device.type == "cuda" and t.dtype in DTYPES for t in tensors)


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """See `compiled.affine.weighted_sum`."""
    count = out.numel()
    inputs = tuple(tensor.view(-1) for tensor in tensors)
    with _on(out):
        sum_kernel[(triton.cdiv(count, BLOCK),)](
            inputs,
            tuple(map(float, factors)),
            out.view(-1),
            count,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def merge_thinned(
    base: Tensor,
    tensors: Sequence[Tensor],
    keeps: Sequence[Keep],
    weights: Sequence[float],
    election: Election,
    scale: float,
    out: Tensor,
) -> None:
    """See `compiled.thinned.merge_thinned`."""
    count, kind = out.numel(), KINDS[type(keeps[0])]
    numbers = tuple(number for keep in keeps for number in _packed(keep))
    with _on(out):
        thinned_kernel[(triton.cdiv(count, BLOCK),)](
            base.view(-1),
            tuple(tensor.view(-1) for tensor in tensors),
            tuple(keep.codes for keep in keeps if isinstance(keep, Graded)),
            numbers,
            tuple(map(float, weights)),
            float(scale),
            float(election.tie),
            out.view(-1),
            count,
            KIND=kind,
            VOTES=election.votes,
            DIVIDES=election.divides,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _on(tensor: Tensor) -> Any:
    """Return a context in which launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device(tensor.device)


def _packed(keep: Keep) -> tuple[float, ...]:
    """Return a keep as `NUMBERS` real numbers, its 32-bit words in halves.

    Triton compiles a kernel anew for whole numbers that are 1 or multiples of 16, and never for real ones.
    """
    match keep:
        case Band():
            low, high = keep.low, keep.high
            return (keep.factor, 0.0, 0.0, *_halves(low.bits, low.share, high.bits, high.share))
        case Draw():
            return (keep.factor, 0.0, 0.0, *_halves(*keep.keys, keep.limit, 0))
    halves = _halves(*keep.keys, int(keep.inverse), 0)
    return (keep.factor, keep.lowest, keep.step, *halves)


def _halves(*words: int) -> list[float]:
    return [float(half) for word in words for half in (word >> 16, word & 0xFFFF)]
