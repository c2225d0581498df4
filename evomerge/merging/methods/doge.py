"""DOGE: sources scaled to one length, a shared correction found by projected gradients, global masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.methods.base import Sources, Values, View, kernel, weighted_sum
from evomerge.merging.methods.subspaces import (
    Matrix,
    MatrixKernel,
    Triplets,
    adam,
    matrices,
    squared_norm,
    triplets,
)

RATE = 1e-4
"""Learning rate of the correction."""

TIED = 1e-6
"""By what share of the largest singular value others may differ and still count as equal."""

HALF = 1 << 16
"""Number of values that the lower half of a 32-bit code has."""

NONE_KEPT = 2**31 - 1
"""A code above that of any finite magnitude."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """Prepared state of one matrix.

    Attributes:
        scales: For each source `eta` over the norm of its delta; 0 for one without a change.
        correction: What is added to every source's delta, out x in, float32.
    """

    scales: tuple[float, ...]
    correction: Tensor


def shared_directions(parts: Sequence[Triplets], count: int) -> Tensor:
    """Return the `count` leading left singular vectors of all parts' left vectors side by side, m x r.

    Fewer, where the last of them would be chosen by rounding from several that are shared equally.
    """
    found = triplets(torch.cat([part.left for part in parts], dim=1))
    values = found.values.tolist()
    if count < len(values):
        count = sum(value > values[count] + TIED * values[0] for value in values[:count])
    return found.first(count).left


def correction(deltas: Sequence[Tensor], scales: Sequence[float], shared: Tensor, steps: int) -> Tensor:
    """Return the correction d that Adam finds from zero, with no movement within the shared directions.

    The loss is `sum_j sum_rows (row sums of t_j * (t_j - sum_i s_i (t_i + d)))^2`, the products entry by
    entry.

    Args:
        deltas: m x k, float64.
        scales: One factor `s_i` for each.
        shared: Orthonormal columns, m x r.
        steps: Number of steps.
    """
    scale = sum(scales)
    merged = torch.zeros_like(deltas[0])
    for delta, own in zip(deltas, scales, strict=True):
        merged.add_(delta, alpha=own)
    gaps = [(delta * (delta - merged)).sum(dim=1, keepdim=True) for delta in deltas]

    def gradient(point: Tensor) -> Tensor:
        slope = torch.zeros_like(point)
        for delta, gap in zip(deltas, gaps, strict=True):
            missing = gap - scale * (delta * point).sum(dim=1, keepdim=True)
            slope.addcmul_(delta, missing, value=-2.0 * scale)
        return slope.sub_(shared @ (shared.T @ slope))

    return adam(torch.zeros_like(merged), gradient, steps, RATE)


def _codes(delta: Tensor) -> Tensor:
    """Return the magnitudes of a delta in float32 as integers that sort the same."""
    return delta.float().abs_().view(torch.int32)


def thresholds(every: Callable[[], Iterable[Matrix]], keep: float) -> tuple[int, ...]:
    """Return for each source the code of the smallest magnitude that is kept of all matrices together.

    Found by counting the upper halves of all codes and then the lower halves of those that share the upper
    half sought: exact, in two sweeps over the deltas, with counts as the only memory.

    Args:
        every: Gives all matrices, at least one, each time it is called.
        keep: Fraction of the entries kept, rounded down; entries as large as the smallest kept are kept too.
    """
    uppers = _counts(every, None)
    wanted = int(keep * int(uppers[0].sum()))
    if not wanted:
        return (NONE_KEPT,) * len(uppers)
    found = [_bin_of(counts, wanted) for counts in uppers]
    lowers = _counts(every, [upper for upper, _ in found])
    return tuple(
        upper * HALF + _bin_of(counts, wanted - above)[0]
        for (upper, above), counts in zip(found, lowers, strict=True)
    )


def _counts(every: Callable[[], Iterable[Matrix]], uppers: Sequence[int] | None) -> list[Tensor]:
    """Return for each source how often each upper half occurs, or each lower half under the given upper."""
    counts: list[Tensor] = []
    for matrix in every():
        for i, delta in enumerate(matrix.deltas()):
            codes = _codes(delta)
            high = codes >> 16
            halves = high.view(-1) if uppers is None else codes[high == uppers[i]] & (HALF - 1)
            found = torch.bincount(halves, minlength=HALF)
            if i == len(counts):
                counts.append(found)
            else:
                counts[i] += found
    return counts


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `wanted`-th largest entry, and how many entries are in the bins above it."""
    sums = counts.flip(0).cumsum(0)
    place = int((sums < wanted).sum())
    return HALF - 1 - place, int(sums[place - 1]) if place else 0


@kernel("doge")
class Doge(MatrixKernel):
    """`theta_0 + lambda sum_i w_i s_i m_i * (tau_i + d)`; tensors that are no matrices stay the base's."""

    prepared_by = ("ends", "eta", "subspace", "steps")

    def prepare_matrix(self, matrix: Matrix, values: Values) -> Corrected:  # noqa: D102
        deltas = matrix.deltas()
        norms = [squared_norm(delta) ** 0.5 for delta in deltas]
        scales = tuple(values.number("eta") / norm if norm else 0.0 for norm in norms)
        each, count = matrix.side // len(deltas), int(matrix.side / values.number("subspace"))
        shared = shared_directions([triplets(delta).first(each) for delta in deltas], count)
        found = correction(deltas, scales, shared, round(values.number("steps")))
        return Corrected(scales, found.float())

    def whole(self, tensors: Sequence[View]) -> tuple[int, ...]:
        """Return each source's threshold over all matrices of the model."""
        taken = [view for view in tensors if self.takes(view.sources(), view.values)]
        if not taken:
            return ()

        def every() -> Iterator[Matrix]:
            for view in taken:
                yield from matrices(view.sources())

        return thresholds(every, taken[0].values.number("keep"))

    def merge_matrix(self, matrix: Matrix, prepared: Corrected, values: Values) -> Tensor:  # noqa: D102
        factors = zip(values.numbers("weight"), prepared.scales, values.whole, strict=True)
        added = prepared.correction.double()
        merged = torch.zeros_like(added)
        for delta, (weight, scale, limit) in zip(matrix.deltas(), factors, strict=True):
            kept = _codes(delta) >= limit
            merged.addcmul_(delta.add_(added), kept, value=weight * scale)
        return merged

    def merge_vector(self, sources: Sources, values: Values, out: Tensor) -> None:
        """Write the base."""
        weighted_sum((sources.given_base,), (1.0,), out)
