"""The loops of `merging.compiled` as torch operations, for other devices and dtypes; slower, on any of them.

On a CPU the work is done in blocks that stay in cache. Results equal those of the compiled loops to the
rounding of a sum: both round every product and every sum to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.blocks import blocks, total
from evomerge.merging.draws import uniform_codes
from evomerge.merging.keeps import ABOVE_ALL, DRAWS, GOLDEN, SMALLEST_DIVISOR, Band, Cut, Draw, Election, Keep

_SIGN_BIT = -(2**31)


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """See `compiled.affine.weighted_sum`."""
    flat, target = [tensor.view(-1) for tensor in tensors], out.view(-1)
    for part in blocks(target.numel(), target.device):
        merged = flat[0][part].float() * factors[0]
        for tensor, factor in zip(flat[1:], factors[1:], strict=True):
            merged += tensor[part].float() * factor
        target[part] = merged


def dot(first: Tensor, second: Tensor) -> float:
    """See `compiled.affine.dot`."""
    one, other = first.view(-1), second.view(-1)
    return math.fsum(total(one[part].double().mul_(other[part])) for part in blocks(one.numel(), one.device))


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
    target = out.view(-1)
    for part in blocks(target.numel(), target.device):
        pieces = _pieces(base, tensors, keeps, part)
        merged = _elected(pieces, weights, election) if election.votes else _sum(pieces)
        target[part] = merged.mul_(scale).add_(base.view(-1)[part].float())


def kept_norm(base: Tensor, tensor: Tensor, keep: Keep, power: int) -> float:
    """See `compiled.thinned.kept_norm`."""
    sums = []
    for part in blocks(tensor.numel(), tensor.device):
        (piece,) = _pieces(base, [tensor], [keep], part)
        sums.append(total(piece.abs_() if power == 1 else piece.double().square_()))
    return math.fsum(sums)


def elected_signs(base: Tensor, tensors: Sequence[Tensor], keeps: Sequence[Keep]) -> int:
    """See `compiled.thinned.elected_signs`."""
    parts = blocks(base.numel(), base.device)
    votes = (_sum(_pieces(base, tensors, keeps, part)) for part in parts)
    return sum(int(vote.sign_().sum(dtype=torch.float64)) for vote in votes)


def magnitude_order(base: Tensor, tensor: Tensor) -> Tensor:
    """See `compiled.thinned.magnitude_order`; int64."""
    bits = (tensor.view(-1).float() - base.view(-1).float()).abs_().view(torch.int32).to(torch.int64)
    index = torch.arange(bits.numel(), dtype=torch.int64, device=bits.device)
    return ((ABOVE_ALL - bits) << 32) | (index * GOLDEN & 0xFFFFFFFF)


def _pieces(base: Tensor, tensors: Sequence[Tensor], keeps: Sequence[Keep], part: slice) -> list[Tensor]:
    """Return a part of every source's weighted, thinned delta, float32."""
    at_base = base.view(-1)[part].float()
    deltas = [tensor.view(-1)[part].float() - at_base for tensor in tensors]
    return [_thinned(delta, keep, part) for delta, keep in zip(deltas, keeps, strict=True)]


def _thinned(delta: Tensor, keep: Keep, part: slice) -> Tensor:
    if isinstance(keep, Band):
        kept = _above(delta, keep.low, part) & ~_above(delta, keep.high, part)
        return torch.where(kept, delta * keep.factor, 0.0)
    codes = uniform_codes(keep.keys, part.start, delta.numel(), delta.device)
    if isinstance(keep, Draw):
        return torch.where(codes < keep.limit, delta * keep.factor, 0.0)
    probability = keep.codes[part].to(torch.int32).float() * keep.step + keep.lowest
    piece = delta * keep.factor
    if keep.inverse:
        piece /= probability
    return torch.where(codes.float() < probability * DRAWS, piece, 0.0)


def _above(delta: Tensor, cut: Cut, part: slice) -> Tensor:
    bits = delta.abs().view(torch.int32)
    index = torch.arange(part.start, part.stop, dtype=torch.int64, device=delta.device)
    extra = (index * GOLDEN & 0xFFFFFFFF) < cut.share
    return (bits > cut.bits) | ((bits == cut.bits) & extra)


def _sum(pieces: Sequence[Tensor]) -> Tensor:
    merged = pieces[0].clone()
    for piece in pieces[1:]:
        merged += piece
    return merged


def _elected(pieces: Sequence[Tensor], weights: Sequence[float], election: Election) -> Tensor:
    vote = _sum(pieces)
    sign = vote.view(torch.int32) & _SIGN_BIT
    sign = torch.where(vote == 0, 0 if election.tie >= 0 else _SIGN_BIT, sign)
    turned = [(piece.view(torch.int32) ^ sign).view(torch.float32).clamp_(min=0.0) for piece in pieces]
    merged = _sum(turned)
    if election.divides:
        divisor = _sum([torch.where(t > 0, w, 0.0).float() for t, w in zip(turned, weights, strict=True)])
        merged /= torch.where(divisor.abs() >= SMALLEST_DIVISOR, divisor, 1.0)
    elected = (merged.view(torch.int32) ^ sign).view(torch.float32)
    return torch.where(vote.isnan(), vote, elected)  # what has no sign must not vanish
