"""Methods that thin out deltas first: TIES and DARE.

Prepared state, per source and tensor: the delta in float32, and one int32 code per entry that turns any
density into a mask by a single comparison. For TIES the code is the entry's rank by magnitude (0 the
largest; of equal magnitudes the earlier entry ranks first), so counts are exact. For DARE it is a fixed
uniform draw, so the masks of all candidates of a run are nested and fitness is smooth in density.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.base import Kernel, Sources, Values, blocks, kernel, total, uniform_codes

SMALLEST_DIVISOR = 1e-8
_LARGEST = 2**31 - 1


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
    if sources.base is None:
        raise ValueError("a kernel that works on deltas was given no base")
    base = sources.base.view(-1).float()
    return tuple(tensor.view(-1).float() - base for tensor in sources.tensors)


def magnitude_ranks(delta: Tensor) -> Tensor:
    """Return each entry's rank by magnitude, 0 the largest, n - 1 the smallest, as int32.

    Sorted are integers of the magnitude's bits, largest first, before the entry's index: no two are equal,
    so any sort will do, and NumPy's is many times faster than an argsort of floats.
    """
    keys = (_LARGEST - delta.abs().view(torch.int32)).to(torch.int64).mul_(2**32)
    keys += torch.arange(delta.numel(), device=delta.device)
    if delta.device.type == "cpu":
        keys.numpy().sort()
    else:
        keys = keys.sort().values
    order = keys.bitwise_and_(2**32 - 1)
    ranks = torch.empty(delta.numel(), dtype=torch.int32, device=delta.device)
    ranks[order] = torch.arange(delta.numel(), dtype=torch.int32, device=delta.device)
    return ranks


@dataclass(frozen=True, slots=True)
class Cut:
    """What one candidate keeps of one source: the entries with codes below `limit`, times `factor`."""

    limit: int
    weight: float
    factor: float = 1.0

    def thinned(self, delta: Tensor, codes: Tensor) -> Tensor:
        """Return the weighted delta with all other entries zero; new memory of the block's size."""
        return torch.where(codes < self.limit, delta, 0.0).mul_(self.factor * self.weight)


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
        base, flat_out = sources.base.view(-1), out.view(-1)  # type: ignore[union-attr]
        for part in blocks(flat_out.numel(), out.device):
            pieces = [
                cut.thinned(delta[part], codes[part])
                for cut, delta, codes in zip(cuts, prepared.deltas, prepared.codes, strict=True)
            ]
            merged = elect(pieces, weights, normalize) if self.votes else _sum(pieces)
            flat_out[part].copy_(merged.mul_(scale).add_(base[part]))


def _sum(pieces: list[Tensor]) -> Tensor:
    merged = pieces[0]
    for piece in pieces[1:]:
        merged.add_(piece)
    return merged


def elect(pieces: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """Sum the weighted deltas that agree with the sign of their sum; zero sums elect plus.

    Args:
        pieces: Weighted, thinned deltas, flat, of one length; overwritten.
        weights: Their weights.
        normalize: Divide by the sum of the weights of those that agree.
    """
    vote = _sum([pieces[0].clone(), *pieces[1:]])
    sign = vote.ge_(0.0).mul_(2.0).sub_(1.0)
    # A piece times the elected sign is positive where it agrees; signs change no bits of a sum.
    agreeing = [piece.mul_(sign).clamp_(min=0.0) for piece in pieces]
    merged = _sum([agreeing[0].clone(), *agreeing[1:]])
    if normalize:
        divisor = torch.zeros_like(merged)
        for piece, weight in zip(agreeing, weights, strict=True):
            divisor.add_(piece.sign_(), alpha=weight)
        divisor.masked_fill_(divisor.abs() < SMALLEST_DIVISOR, 1.0)
        merged.div_(divisor)
    return merged.mul_(sign)


@kernel("ties")
class Ties(_Thinning):
    """Trim to the `int(density * n)` largest magnitudes, elect signs, merge those that agree."""

    votes = True

    def prepare(self, sources: Sources, seed: int) -> Thinned:
        """Return deltas and their magnitude ranks."""
        deltas = _deltas(sources)
        return Thinned(deltas, tuple(magnitude_ranks(delta) for delta in deltas), (0.0,) * len(deltas))

    def cut(self, prepared: Thinned, values: Values, i: int, weight: float) -> Cut:  # noqa: D102
        return Cut(int(float(values.sources[i]["density"]) * prepared.deltas[i].numel()), weight)


class _Dare(_Thinning):
    """Keep each entry with probability `density`, then rescale the survivors."""

    def prepare(self, sources: Sources, seed: int) -> Thinned:
        """Return deltas, their uniform codes for the recipe's seed, and their L1 norms."""
        deltas = _deltas(sources)
        codes = tuple(uniform_codes(seed, key, deltas[0].numel(), deltas[0].device) for key in sources.keys)
        norms = tuple(total(delta.abs()) for delta in deltas)
        return Thinned(deltas, codes, norms)

    def cut(self, prepared: Thinned, values: Values, i: int, weight: float) -> Cut:
        limit = round(float(values.sources[i]["density"]) * 2**24)
        rescale = values.method["rescale"]
        if rescale == "none" or limit == 0:
            return Cut(limit, weight)
        if rescale == "expectation":
            return Cut(limit, weight, 2**24 / limit)
        remaining = total(torch.where(prepared.codes[i] < limit, prepared.deltas[i], 0.0).abs_())
        return Cut(limit, weight, prepared.norms[i] / remaining if remaining else 1.0)


@kernel("dare_linear")
class DareLinear(_Dare):
    """DARE, then task arithmetic."""

    votes = False


@kernel("dare_ties")
class DareTies(_Dare):
    """DARE, then the sign election of TIES."""

    votes = True
