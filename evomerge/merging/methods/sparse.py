"""Methods that thin out deltas first: TIES and DARE.

Prepared state, per source and tensor: the delta in float32, and one int32 code per entry that turns any
density into a mask by a single comparison. For TIES the code is the entry's rank by magnitude (0 the
largest; of equal magnitudes the earlier entry ranks first), so counts are exact. For DARE it is a fixed
uniform draw, so the masks of all candidates of a run are nested and fitness is smooth in density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.base import (
    Kernel,
    Sources,
    Values,
    block_buffers,
    blocks,
    in_float32,
    kernel,
    total,
    uniform_codes,
)

SMALLEST_DIVISOR = 1e-8
_LARGEST = 2**31 - 1
_SIGN_BIT = -(2**31)


@dataclass(frozen=True, slots=True)
class Thinned:
    """Prepared state of one tensor.

    Attributes:
        deltas: For each source the flat delta, float32, n entries.
        codes: For each source n int32 codes; see the module.
        norms: For each source the sum of the delta's magnitudes.
    """

    deltas: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    norms: tuple[float, ...]


def _deltas(sources: Sources) -> tuple[Tensor, ...]:
    base = sources.given_base.view(-1)
    return tuple(tensor.view(-1).to(torch.float32, copy=True).sub_(base) for tensor in sources.tensors)


def magnitude_ranks(delta: Tensor) -> Tensor:
    """Return each entry's rank by magnitude, 0 the largest, n - 1 the smallest, as int32.

    Sorted are integers of the magnitude's bits, largest first, before the entry's index: no two are equal,
    so any sort will do, and NumPy's is many times faster than an argsort of floats.
    """
    count, device = delta.numel(), delta.device
    keys = torch.empty(count, dtype=torch.int64, device=device)
    for part in blocks(count, device):
        magnitudes = delta[part].abs().view(torch.int32)
        torch.arange(part.start, part.stop, out=keys[part])
        keys[part].add_(_LARGEST - magnitudes, alpha=2**32)
    if device.type == "cpu":
        keys.numpy().sort()
    else:
        keys = keys.sort().values
    ranks = torch.empty(count, dtype=torch.int32, device=device)
    for part in blocks(count, device):
        order = keys[part] & (2**32 - 1)
        ranks[order] = torch.arange(part.start, part.stop, dtype=torch.int32, device=device)
    return ranks


@dataclass(frozen=True, slots=True)
class Cut:
    """What one candidate keeps of one source: the entries with codes below `limit`, times `factor`."""

    limit: int
    weight: float
    factor: float = 1.0

    def thin(self, delta: Tensor, codes: Tensor, out: Tensor) -> None:
        """Write the weighted delta to `out`, all other entries zero.

        A code minus the limit is negative where the entry is kept; its sign, spread over all bits, masks the
        delta's bits. That is several times faster than a comparison and `torch.where`.
        """
        bits = out.view(torch.int32)
        torch.sub(codes, self.limit, out=bits)
        bits.bitwise_right_shift_(31).bitwise_and_(delta.view(torch.int32))
        out.mul_(self.factor * self.weight)


class _Thinning(Kernel):
    """What TIES and DARE share: the sweep over blocks, with or without a vote."""

    votes: bool

    def cut(self, prepared: Thinned, values: Values, i: int, weight: float) -> Cut:
        """Return what this candidate keeps of source `i`, which counts with `weight`."""
        raise NotImplementedError

    def merge(self, sources: Sources, prepared: Thinned, values: Values, out: Tensor) -> None:
        scale = values.number("lambda")
        normalize = bool(values.method["normalize"])
        weights = shares(values.numbers("weight"), normalize and not self.votes)
        cuts = [self.cut(prepared, values, i, weight) for i, weight in enumerate(weights)]
        base, flat_out = sources.given_base.view(-1), out.view(-1)
        buffers = block_buffers(len(cuts) + 2, flat_out)
        for part in blocks(flat_out.numel(), out.device):
            *pieces, first, second = buffers[:, : part.stop - part.start]
            for cut, delta, codes, piece in zip(cuts, prepared.deltas, prepared.codes, pieces, strict=True):
                cut.thin(delta[part], codes[part], piece)
            if self.votes:
                merged = elect(pieces, weights, normalize, first, second)
            else:
                merged = _sum(pieces, pieces[0])
            merged.mul_(scale).add_(in_float32(base[part], first))
            flat_out[part].copy_(merged)


def _sum(pieces: Sequence[Tensor], out: Tensor) -> Tensor:
    if out is not pieces[0]:
        out.copy_(pieces[0])
    for piece in pieces[1:]:
        out.add_(piece)
    return out


def elect(
    pieces: Sequence[Tensor], weights: Sequence[float], normalize: bool, first: Tensor, second: Tensor
) -> Tensor:
    """Return the sum of the weighted deltas that agree with the sign of their sum; zero sums elect plus.

    Args:
        pieces: Weighted, thinned deltas, flat, float32, of one length; overwritten.
        weights: Their weights.
        normalize: Divide by the sum of the weights of those that agree.
        first: A buffer of that length, which may hold the result.
        second: Another one.
    """
    vote = _sum(pieces, first)  # minus zero only where every piece is zero, and there it does no harm
    sign = vote.view(torch.int32).bitwise_and_(_SIGN_BIT)
    for piece in pieces:  # positive where it agrees, else zero
        piece.view(torch.int32).bitwise_xor_(sign)
        piece.clamp_(min=0.0)
    merged = _sum(pieces, second)
    merged.view(torch.int32).bitwise_xor_(sign)
    if normalize:
        divisor = first.zero_()
        for piece, weight in zip(pieces, weights, strict=True):
            divisor.add_(piece.sign_(), alpha=weight)
        if min(weights) >= 0:
            divisor.clamp_(min=SMALLEST_DIVISOR)
        else:
            divisor.masked_fill_(divisor.abs() < SMALLEST_DIVISOR, 1.0)
        merged.div_(divisor)
    return merged


@kernel("ties")
class Ties(_Thinning):
    """Trim to the `int(density * n)` largest magnitudes, elect signs, merge those that agree."""

    votes = True

    def prepare(self, sources: Sources, values: Values) -> Thinned:
        """Return deltas and their magnitude ranks."""
        deltas = _deltas(sources)
        return Thinned(deltas, tuple(magnitude_ranks(delta) for delta in deltas), (0.0,) * len(deltas))

    def cut(self, prepared: Thinned, values: Values, i: int, weight: float) -> Cut:  # noqa: D102
        return Cut(int(float(values.sources[i]["density"]) * prepared.deltas[i].numel()), weight)


class _Dare(_Thinning):
    """Keep each entry with probability `density`, then rescale the survivors."""

    prepared_by = ("seed",)

    def prepare(self, sources: Sources, values: Values) -> Thinned:
        """Return deltas, their uniform codes for the recipe's seed, and their L1 norms."""
        deltas = _deltas(sources)
        codes = tuple(
            uniform_codes(values.seed, key, deltas[0].numel(), deltas[0].device) for key in sources.keys
        )
        norms = tuple(total(delta.abs()) for delta in deltas)
        return Thinned(deltas, codes, norms)

    def cut(self, prepared: Thinned, values: Values, i: int, weight: float) -> Cut:
        limit = round(float(values.sources[i]["density"]) * 2**24)
        rescale = values.method["rescale"]
        if rescale == "none" or limit == 0:
            return Cut(limit, weight)
        if rescale == "expectation":
            return Cut(limit, weight, 2**24 / limit)
        kept = torch.empty_like(prepared.deltas[i])
        Cut(limit, 1.0).thin(prepared.deltas[i], prepared.codes[i], kept)
        remaining = total(kept.abs_())
        return Cut(limit, weight, prepared.norms[i] / remaining if remaining else 1.0)


@kernel("dare_linear")
class DareLinear(_Dare):
    """DARE, then task arithmetic."""

    votes = False


@kernel("dare_ties")
class DareTies(_Dare):
    """DARE, then the sign election of TIES."""

    votes = True
