"""Methods that thin out deltas first: TIES, Model Breadcrumbs, DARE and DELLA.

Prepared state is what turns any density into a mask without looking at the other entries: for TIES and
Breadcrumbs the order of magnitudes as a `Ladder` (some 200 kB for each tensor of each source at most), for
DELLA a 16-bit rank within its row for every entry. DARE needs none. Masks of random methods come from draws
that are a function of seed, source, tensor and entry: nested in density and the same for all candidates of a
run, so that fitness is smooth in density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.draws import draw_keys
from evomerge.merging.keeps import ALL_ABOVE, DRAWS, NONE_ABOVE, Band, Cut, Draw, Election, Graded, Keep
from evomerge.merging.ladder import Ladder, common_cut, cut_at, ladder_of
from evomerge.merging.loops import elected_signs, kept_norm, merge_thinned
from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.base import Kernel, Sources, Values, View, kernel

EVERYTHING = Band(1.0, ALL_ABOVE)
TOP_CODE = 2**16 - 1

ROWS_ELEMENTS = 2**18
"""Entries whose rows are ranked at a time; the sort keeps 40 bytes for each."""


class Thinning(Kernel):
    """What all share: the sweep, with or without an election."""

    votes: bool

    def keeps(self, sources: Sources, prepared: Any, values: Values) -> list[Keep]:
        """Return what this candidate keeps of each source, with factor 1."""
        raise NotImplementedError

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        normalize = bool(values.method["normalize"])
        weights = shares(values.numbers("weight"), normalize and not self.votes)
        keeps = [
            _times(keep, weight)
            for keep, weight in zip(self.keeps(sources, prepared, values), weights, strict=True)
        ]
        election = Election(self.votes, normalize, self.tie(values))
        scale = values.number("lambda")
        merge_thinned(sources.given_base, sources.tensors, keeps, weights, election, scale, out)

    def tie(self, values: Values) -> int:
        """Return the sign that a sum of zero elects."""
        del values
        return 1


def _times(keep: Keep, factor: float) -> Keep:
    match keep:
        case Band():
            return Band(keep.factor * factor, keep.low, keep.high)
        case Draw():
            return Draw(keep.factor * factor, keep.keys, keep.limit)
    return Graded(keep.factor * factor, keep.keys, keep.codes, keep.lowest, keep.step, keep.inverse)


class _Ranked(Thinning):
    """Methods that thin out by the order of magnitudes."""

    one_shot = True

    def prepare(self, sources: Sources, values: Values) -> tuple[Ladder, ...]:
        """Return the order of magnitudes of each source's delta."""
        return tuple(ladder_of(sources.given_base, tensor) for tensor in sources.tensors)

    def cut(self, sources: Sources, prepared: tuple[Ladder, ...] | None, i: int, rank: int) -> Cut:
        """Return the cut that about `rank` entries of the delta of source `i` lie above."""
        if prepared is not None:
            return prepared[i].cut(rank)
        return cut_at(sources.given_base, sources.tensors[i], rank)


@dataclass(frozen=True, slots=True)
class WholeTies:
    """What the paper's TIES knows of the whole model: each source's cut, and the sign that ties elect."""

    keeps: tuple[Keep, ...]
    tie: int


@kernel("ties")
class Ties(_Ranked):
    """Trim to the largest magnitudes, elect signs, merge those that agree."""

    votes = True

    def keeps(self, sources: Sources, prepared: Any, values: Values) -> list[Keep]:  # noqa: D102
        if values.whole is not None:
            return list(values.whole.keeps)
        count, densities = sources.given_base.numel(), values.numbers("density")
        return [Band(1.0, self.cut(sources, prepared, i, _rank(d, count))) for i, d in enumerate(densities)]

    def tie(self, values: Values) -> int:  # noqa: D102
        return values.whole.tie if values.whole is not None else 1

    def whole(self, tensors: Sequence[View]) -> WholeTies | None:
        """Return the cuts over the whole model, for the paper's variant; None for mergekit's."""
        if not tensors or tensors[0].values.method["variant"] == "mergekit":
            return None
        states = [tensor.prepared() or self.prepare(tensor.sources(), tensor.values) for tensor in tensors]
        keeps: list[Keep] = []
        for i, density in enumerate(tensors[0].values.numbers("density")):
            if any(tensor.values.numbers("density")[i] != density for tensor in tensors):
                raise CandidateError("density: the paper's TIES trims the whole model by one density")
            ladders = [state[i] for state in states]
            rank = _rank(density, sum(ladder.count for ladder in ladders))
            keeps.append(Band(1.0, common_cut(ladders, rank)))
        surplus = 0
        for tensor in tensors:
            sources = tensor.sources()
            weighted = [
                _times(keep, w) for keep, w in zip(keeps, tensor.values.numbers("weight"), strict=True)
            ]
            surplus += elected_signs(sources.given_base, sources.tensors, weighted)
        return WholeTies(tuple(keeps), -1 if surplus < 0 else 1)


def _rank(density: float, count: int) -> int:
    """Return how many of `count` entries are kept: at least one, unless the density is 0."""
    return max(1, int(density * count)) if density > 0 else 0


class _Breadcrumbs(_Ranked):
    """Drop the largest magnitudes and the smallest, keep those between."""

    def keeps(self, sources: Sources, prepared: Any, values: Values) -> list[Keep]:
        keeps: list[Keep] = []
        count = sources.given_base.numel()
        pairs = zip(values.numbers("density"), values.numbers("gamma"), strict=True)
        for i, (density, gamma) in enumerate(pairs):
            wanted = int(density * count)
            # Fewer outliers are dropped where as many as wanted would not be left.
            top = min(int(gamma * count), count - wanted)
            low = self.cut(sources, prepared, i, top + wanted) if wanted else NONE_ABOVE
            keeps.append(Band(1.0, low, self.cut(sources, prepared, i, top)))
        return keeps


@kernel("breadcrumbs")
class Breadcrumbs(_Breadcrumbs):
    """Breadcrumbs, then task arithmetic."""

    votes = False


@kernel("breadcrumbs_ties")
class BreadcrumbsTies(_Breadcrumbs):
    """Breadcrumbs, then the sign election of TIES."""

    votes = True


class _Dare(Thinning):
    """Keep each entry with probability `density`, then rescale the survivors."""

    def keeps(self, sources: Sources, prepared: Any, values: Values) -> list[Keep]:
        keeps: list[Keep] = []
        for tensor, key, density in zip(
            sources.tensors, sources.keys, values.numbers("density"), strict=True
        ):
            keep = Draw(1.0, draw_keys(values.seed, key), round(density * DRAWS))
            inverse = DRAWS / keep.limit if keep.limit else 1.0
            keeps.append(_rescaled(keep, inverse, sources.given_base, tensor, values))
        return keeps


def _rescaled(keep: Keep, inverse: float, base: Tensor, tensor: Tensor, values: Values) -> Keep:
    """Return the keep with the factor that `rescale` asks for; `inverse` is that of the expectation."""
    rescale = values.method["rescale"]
    if rescale == "none":
        return keep
    if rescale == "expectation":
        return _times(keep, inverse)
    power = 1 if rescale == "l1" else 2
    remaining = kept_norm(base, tensor, keep, power)
    if not remaining:
        return keep
    ratio: float = (kept_norm(base, tensor, EVERYTHING, power) / remaining) ** (1 / power)
    return _times(keep, ratio)


@kernel("dare_linear")
class DareLinear(_Dare):
    """DARE, then task arithmetic."""

    votes = False


@kernel("dare_ties")
class DareTies(_Dare):
    """DARE, then the sign election of TIES."""

    votes = True


class _Della(Thinning):
    """Keep entries with a probability that grows with their rank in their row, then rescale them."""

    def prepare(self, sources: Sources, values: Values) -> tuple[Tensor, ...]:
        """Return each entry's rank by magnitude in its row, 0 the smallest, as uint16, flat."""
        return tuple(row_codes(sources.given_base, tensor) for tensor in sources.tensors)

    def keeps(self, sources: Sources, prepared: Any, values: Values) -> list[Keep]:
        keeps: list[Keep] = []
        width = sources.given_base.shape[-1] if sources.given_base.dim() else 1
        steps = min(width - 1, TOP_CODE)
        expected = values.method["rescale"] == "expectation"
        per_source = zip(
            sources.tensors,
            sources.keys,
            prepared,
            values.numbers("density"),
            values.numbers("epsilon"),
            strict=True,
        )
        for tensor, key, codes, density, epsilon in per_source:
            if 0 < density < 1 and not epsilon < min(density, 1 - density):
                raise CandidateError(
                    f"epsilon: expected below min(density, 1 - density) = {min(density, 1 - density):g}, "
                    f"got {epsilon:g}"
                )
            spread = epsilon if 0 < density < 1 and steps > 0 else 0.0
            step = 2 * spread / steps if steps > 0 else 0.0
            keep = Graded(
                1.0, draw_keys(values.seed, key), codes, density - spread, step, expected and density > 0
            )
            keeps.append(_rescaled(keep, 1.0, sources.given_base, tensor, values))
        return keeps


def row_codes(base: Tensor, tensor: Tensor) -> Tensor:
    """Return each entry's rank by magnitude in its row (the last dimension), 0 the smallest, as uint16.

    Of equal magnitudes the earlier entry has the smaller rank. Ranks of rows of more than 65,536 entries are
    divided by their length so that the largest is 65,535.
    """
    count = tensor.numel()
    width = tensor.shape[-1] if tensor.dim() else 1
    codes = torch.empty(count, dtype=torch.uint16, device=tensor.device)
    if not count:
        return codes
    rows, flat, flat_base = codes.view(-1, width), tensor.view(-1, width), base.view(-1, width)
    step = max(1, ROWS_ELEMENTS // width)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        magnitudes = (flat[part].float() - flat_base[part].float()).abs_()
        rows[part] = _ranks_in_rows(magnitudes, width).to(torch.uint16)
    return codes


def _ranks_in_rows(magnitudes: Tensor, width: int) -> Tensor:
    """Return ranks scaled to 16 bits where they need it; int64."""
    if magnitudes.device.type == "cpu":
        # Sorting pairs of magnitude and position as one integer is many times faster than an argsort.
        keys = magnitudes.view(torch.int32).numpy().astype(np.uint64) << np.uint64(32)
        keys |= np.arange(width, dtype=np.uint64)
        keys.sort(axis=1)
        order = torch.from_numpy((keys & np.uint64(2**32 - 1)).astype(np.int64))
    else:
        order = magnitudes.argsort(dim=1, stable=True)
    places = torch.arange(width, device=magnitudes.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return ranks if width - 1 <= TOP_CODE else ranks * TOP_CODE // (width - 1)


@kernel("della")
class Della(_Della):
    """DELLA, then the sign election of TIES."""

    votes = True


@kernel("della_linear")
class DellaLinear(_Della):
    """DELLA, then task arithmetic."""

    votes = False
