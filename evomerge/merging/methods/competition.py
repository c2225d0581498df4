"""PCB-Merging, and exact order statistics of models that are too large to sort.

An order statistic of float32 numbers is found by counting, in two sweeps: first the upper 16 bits of all
numbers, then the lower 16 bits of those that share the upper ones of the wanted rank. Memory is one table
of 65,536 counts per source, whatever the size of the model, and the result is that of a full sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merging.blocks import block_buffers, blocks, in_float32
from evomerge.merging.methods.base import Kernel, Sources, Values, View, kernel

CLIPPED = 1e-4
"""Fraction of the magnitudes that PCB clips at either end."""

SMALLEST_SHARE = 1e-12
_HALF = 1 << 16

Sweep = Callable[[], Iterator[Sequence[Tensor]]]
"""Yields parts of the vectors to rank: one flat float32 tensor of each at every step, the same every time."""


def order_statistics(sweep: Sweep, vectors: int, ranks: Sequence[int]) -> list[list[float]]:
    """Return, for each vector, the numbers of the given ranks; equal numbers have ranks one after another.

    Args:
        sweep: Called twice.
        vectors: How many vectors it yields parts of.
        ranks: 0 is the smallest, the number of a vector's entries minus 1 the largest.

    Returns:
        One list per vector, in the order of `ranks`.
    """
    upper = torch.zeros((vectors, _HALF), dtype=torch.int64)
    for parts in sweep():
        for counts, part in zip(upper, parts, strict=True):
            counts += _counted((_codes(part) >> 16) + _HALF // 2)
    targets = [[_located(counts, rank) for rank in ranks] for counts in upper]
    lower = [{bucket: torch.zeros(_HALF, dtype=torch.int64) for bucket, _ in wanted} for wanted in targets]
    for parts in sweep():
        for tables, part in zip(lower, parts, strict=True):
            codes = _codes(part)
            buckets = (codes >> 16) + _HALF // 2
            for bucket, counts in tables.items():
                counts += _counted(codes[buckets == bucket] & (_HALF - 1))
    return [
        [_decoded(bucket, _located(tables[bucket], rest)[0]) for bucket, rest in wanted]
        for tables, wanted in zip(lower, targets, strict=True)
    ]


def _codes(numbers: Tensor) -> Tensor:
    """Return int32 that are ordered like the float32 they stand for; minus zero comes before zero."""
    bits = numbers.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _decoded(upper: int, lower: int) -> float:
    code = torch.tensor(((upper - _HALF // 2) << 16) + lower, dtype=torch.int32)
    return float((code ^ ((code >> 31) & 0x7FFFFFFF)).view(torch.float32))


def _counted(halves: Tensor) -> Tensor:
    return torch.bincount(halves, minlength=_HALF).cpu()


def _located(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return where the number of a rank is counted, and its rank among those that are counted there."""
    until = counts.cumsum(0)
    place = int(torch.searchsorted(until, rank, right=True))
    return place, rank - (int(until[place - 1]) if place else 0)


def check_same_sources(first: Sources, other: Sources, what: str) -> None:
    """Check that two tensors which are judged together have the same sources in the same order.

    Raises:
        RecipeError: A slice leaves some of them out.
    """
    ours, theirs = ([key.split("\x1f")[0] for key in sources.keys] for sources in (first, other))
    if ours != theirs:
        raise RecipeError(
            f"{what}: {first.place.name} and {other.place.name} are judged together but have different "
            "sources; give every slice all sources, or let each tensor be judged alone"
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """What one source's entries are measured by, in the model or in one tensor.

    Attributes:
        count: Number of entries that compete.
        low: Smallest magnitude after clipping.
        high: Largest magnitude after clipping.
        least: Score from which on an entry has a share.
        most: Largest score.
    """

    count: int
    low: float
    high: float
    least: float = 0.0
    most: float = 0.0


Standings = tuple[Standing, ...]
Read = Callable[[], Sources]


@kernel("pcb")
class Pcb(Kernel):
    """Average of the clipped deltas by their shares, which are scores scaled to [0, 1] above a quantile.

    The score of an entry is `exp(N m^2) tanh(tau_i sum_j tau_j)` with `m` the clipped magnitude scaled to
    [0, 1]. It is computed less the factor `exp(N)`, which leaves the shares as they are and cannot overflow.
    """

    prepared_by = ("scope",)

    def prepare(self, sources: Sources, values: Values) -> Standings | None:
        """Return the magnitudes to clip at where entries compete within the tensor."""
        return _clipping([lambda: sources]) if values.method["scope"] == "tensor" else None

    def whole(self, tensors: Sequence[View]) -> Standings | None:
        """Return what the entries of the whole model are measured by, if that is the scope."""
        method = tensors[0].values.method
        if method["scope"] == "tensor":
            return None
        first = tensors[0].sources()
        for view in tensors[1:]:
            check_same_sources(first, view.sources(), "pcb with scope model")
        reads = [view.sources for view in tensors]
        return _scored(reads, _clipping(reads), float(method["ratio"]))

    def merge(  # noqa: D102
        self, sources: Sources, prepared: Standings | None, values: Values, out: Tensor
    ) -> None:
        if not out.numel():
            return
        standings: Standings = values.whole
        if prepared is not None:
            standings = _scored([lambda: sources], prepared, values.number("ratio"))
        scale, weights = values.number("lambda"), values.numbers("weight")
        base, flat_out = sources.given_base.view(-1), out.view(-1)
        for part, deltas, whole, scratch in _sweep(sources):
            score, divisor, merged = scratch
            divisor.zero_()
            merged.zero_()
            for delta, standing, weight in zip(deltas, standings, weights, strict=True):
                share = _shares(_score(delta, whole, standing, len(deltas), score), standing)
                divisor.add_(share)
                magnitude = delta.abs().clamp_(standing.low, standing.high)
                merged.addcmul_(delta.sign_(), magnitude.mul_(share), value=weight)
            merged.div_(divisor.clamp_(min=SMALLEST_SHARE)).mul_(scale)
            flat_out[part].copy_(merged.add_(in_float32(base[part], divisor)))


def _sweep(sources: Sources) -> Iterator[tuple[slice, Sequence[Tensor], Tensor, Sequence[Tensor]]]:
    """Yield each block of a tensor: where it is, its deltas, their sum, three buffers; all in float32."""
    base = sources.given_base.view(-1)
    tensors = [tensor.view(-1) for tensor in sources.tensors]
    buffers = block_buffers(len(tensors) + 4, base)
    for part in blocks(base.numel(), base.device):
        whole, *others = buffers[:, : part.stop - part.start]
        scratch, deltas = others[:3], others[3:]
        whole.zero_()
        for delta, tensor in zip(deltas, tensors, strict=True):
            whole.add_(delta.copy_(tensor[part]).sub_(base[part]))
        yield part, deltas, whole, scratch


def _clipping(reads: Sequence[Read]) -> Standings:
    """Return the magnitudes that deltas are clipped to, by the index rule of the paper's code."""
    shapes = [(read().given_base.numel(), len(read().tensors)) for read in reads]
    count = sum(numel for numel, _ in shapes)
    if not count:
        return ()

    def sweep() -> Iterator[Sequence[Tensor]]:
        for read in reads:
            for _, deltas, _, _ in _sweep(read()):
                yield [delta.abs_() for delta in deltas]

    ranks = (int(count * CLIPPED), int(count * (1 - CLIPPED) - 1))
    found = order_statistics(sweep, shapes[0][1], ranks)
    return tuple(Standing(count, low, max(low, high)) for low, high in found)


def _scored(reads: Sequence[Read], clipping: Standings, ratio: float) -> Standings:
    """Return the standings with the scores in them."""
    if not clipping:
        return clipping

    def sweep() -> Iterator[Sequence[Tensor]]:
        for read in reads:
            for _, deltas, whole, (score, *_) in _sweep(read()):
                yield [
                    _score(delta, whole, standing, len(deltas), score).clone()
                    for delta, standing in zip(deltas, clipping, strict=True)
                ]

    count = clipping[0].count
    ranks = (min(int(count * (1 - ratio)), count - 1), count - 1)
    found = order_statistics(sweep, len(clipping), ranks)
    return tuple(
        replace(standing, least=least, most=most)
        for standing, (least, most) in zip(clipping, found, strict=True)
    )


def _score(delta: Tensor, whole: Tensor, standing: Standing, count: int, out: Tensor) -> Tensor:
    """Write the scores of one block of one of `count` sources to `out`."""
    torch.abs(delta, out=out).clamp_(standing.low, standing.high).sub_(standing.low)
    if standing.high > standing.low:
        out.div_(standing.high - standing.low)
    out.square_().sub_(1.0).mul_(count).exp_()
    return out.mul_((delta * whole).tanh_())


def _shares(score: Tensor, standing: Standing) -> Tensor:
    """Turn scores into shares, in place."""
    width = standing.most - standing.least
    if width > 0:
        return score.sub_(standing.least).div_(width).clamp_(min=0.0)
    return score.copy_(score >= standing.most) if standing.most > 0 else score.zero_()
