"""Methods that recombine the singular directions of the deltas: TSV-Merge, Iso-C and Iso-CTS.

Singular vectors are fixed only up to sign and, where singular values are equal, up to rotation; no result
here depends on the sign. Directions with a singular value of zero (beyond rounding, see
`subspaces.tolerance`) contribute nothing, and polar factors are zero on them, so that sources without a
change, or with the same one, have a merge that rounding does not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.methods.base import Sources, Values, kernel
from evomerge.merging.methods.subspaces import Matrix, MatrixKernel, Triplets, polar_factor, triplets


def kept_rank(share: float, side: int, count: int) -> int:
    """Return how many triplets each of `count` sources keeps: `share` of side / count, at least 1."""
    return max(1, int(share * side / count))


@dataclass(frozen=True, slots=True)
class Directions:
    """Prepared state of TSV-Merge for one matrix, m x k, float32.

    Attributes:
        left: The sources' left singular vectors made orthogonal to each other, m x sum of ranks.
        values: Each source's singular values, descending.
        right: The right singular vectors, likewise, sum of ranks x k.
    """

    left: Tensor
    values: tuple[Tensor, ...]
    right: Tensor


def decorrelated(parts: Sequence[Triplets]) -> tuple[Tensor, Tensor]:
    """Return all left vectors (m x R) and all right ones (R x k), each the polar factor of their stack."""
    left, _ = polar_factor(torch.cat([part.left for part in parts], dim=1))
    right, _ = polar_factor(torch.cat([part.right for part in parts]))
    return left, right


@kernel("tsv_m")
class TSVMerge(MatrixKernel):
    """`theta_0 + lambda U diag(w_i S_i) V`, with U and V the sources' leading vectors, decorrelated.

    Weights scale the singular values only, so a candidate costs one product of m x R and R x k.
    """

    prepared_by = ("ends", "rank")

    def takes(self, sources: Sources, values: Values) -> bool:
        """Return whether the tensor is a matrix with at least one direction for every source."""
        return super().takes(sources, values) and min(sources.tensors[0].shape[-2:]) >= len(sources.tensors)

    def prepare_matrix(self, matrix: Matrix, values: Values) -> Directions:  # noqa: D102
        count = kept_rank(values.number("rank"), matrix.side, len(matrix.tensors))
        parts = [triplets(delta).first(count) for delta in matrix.deltas()]
        left, right = decorrelated(parts)
        return Directions(left.float(), tuple(part.values.float() for part in parts), right.float())

    def merge_matrix(self, matrix: Matrix, prepared: Directions, values: Values) -> Tensor:  # noqa: D102
        weights = values.numbers("weight")
        pairs = zip(weights, prepared.values, strict=True)
        scaled = torch.cat([weight * part.double() for weight, part in pairs])
        return (prepared.left.double() * scaled) @ prepared.right.double()


@kernel("iso_c")
class IsoC(MatrixKernel):
    """The weighted sum of the deltas with all its non-zero singular values set to their mean."""

    def merge_matrix(self, matrix: Matrix, prepared: None, values: Values) -> Tensor:  # noqa: D102
        merged = matrix.weighted(values.numbers("weight"))
        factor, rank = polar_factor(merged)
        nuclear_norm = float((factor * merged).sum())
        return factor.mul_(nuclear_norm / max(1, rank))


def common_rank(share: float, side: int, count: int) -> tuple[int, int]:
    """Return the number of directions that are common, and of those each of `count` sources adds.

    The common share is moved so that the rest divides by the number of sources.
    """
    each = min(round((side - int(side * share)) / count), side // count)
    return side - each * count, each


@kernel("iso_cts")
class IsoCTS(MatrixKernel):
    """Common directions of the sum and each source's own outside of them, all with one singular value."""

    def merge_matrix(self, matrix: Matrix, prepared: None, values: Values) -> Tensor:  # noqa: D102
        weights, deltas = values.numbers("weight"), matrix.deltas()
        weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
        common_count, each = common_rank(values.number("common"), matrix.side, len(weighted))
        common = triplets(torch.stack(weighted).sum(dim=0)).first(common_count)
        parts = []
        for delta in weighted:
            size = float(torch.linalg.matrix_norm(delta))
            own = delta - common.left @ (common.left.T @ delta)
            parts.append(triplets(own, size).first(each))
        parts.append(common)
        collected = torch.cat([part.values for part in parts])
        if not collected.numel():
            return torch.zeros_like(weighted[0])
        left, right = decorrelated(parts)
        return (left @ right).mul_(float(collected.mean()))
