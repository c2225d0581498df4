"""Deltas as matrices: which tensors are, their singular values and polar factors, and a kernel over them.

All of it is computed in float64: directions are told from rounding noise by what float32 can hold, and the
factors of nearly dependent sources stay accurate. Linear algebra on a CPU runs in one thread, since LAPACK
and BLAS divide their sums by the number of threads, and a result must not depend on that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.methods.base import Kernel, Sources, Values, total, weighted_sum
from evomerge.records import Role

MATRIX_ROLES: tuple[Role, ...] = ("attention", "mlp", "other")
END_ROLES: tuple[Role, ...] = ("embedding", "head")

FLOAT32_EPSILON = 2.0**-23
ADAM_MOMENTS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


def is_matrix(sources: Sources, ends: bool) -> bool:
    """Return whether a tensor is worked on as a matrix (2-D) or as several (3-D: one per expert).

    Args:
        sources: The tensor.
        ends: Whether embedding and head are worked on as matrices too.
    """
    shape = sources.tensors[0].shape
    roles = MATRIX_ROLES + (END_ROLES if ends else ())
    return len(shape) in (2, 3) and shape.numel() > 0 and sources.place.role in roles


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations in one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix, out x in, in the base and in every source, as views of their tensors."""

    base: Tensor
    tensors: tuple[Tensor, ...]

    @property
    def side(self) -> int:
        """The smaller of its two sides: its largest possible rank."""
        return min(self.base.shape)

    def deltas(self) -> list[Tensor]:
        """Return every source's difference from the base, float64."""
        base = self.base.double()
        return [tensor.double().sub_(base) for tensor in self.tensors]

    def weighted(self, weights: Sequence[float]) -> Tensor:
        """Return `sum_i w_i tau_i`, float64."""
        base = self.base.double()
        merged = torch.zeros_like(base)
        for tensor, weight in zip(self.tensors, weights, strict=True):
            merged.add_(tensor.double().sub_(base), alpha=weight)
        return merged


def matrices(sources: Sources) -> list[Matrix]:
    """Return the matrices that a 2-D or 3-D tensor consists of."""
    stacks = [stacked(tensor) for tensor in (sources.given_base, *sources.tensors)]
    return [Matrix(base, tuple(tensors)) for base, *tensors in zip(*stacks, strict=True)]


def stacked(tensor: Tensor) -> Tensor:
    """Return a contiguous 2-D or 3-D tensor as matrices, count x out x in."""
    return tensor.view(-1).view(-1, *tensor.shape[-2:])


def tolerance(shape: Sequence[int]) -> float:
    """Return the share of the largest singular value below which one is rounding noise of float32."""
    return math.sqrt(max(shape)) * FLOAT32_EPSILON


@dataclass(frozen=True, slots=True)
class Triplets:
    """Leading singular triplets: `left` (m x r) times `values` (r, descending) times `right` (r x k)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Triplets:
        """Return the largest `count` of them, or all if there are fewer."""
        return Triplets(self.left[:, :count], self.values[:count], self.right[:count])


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, ascending, none below zero, and its eigenvectors.

    Args:
        matrix: n x n, float64, without negative eigenvalues but for rounding.

    Raises:
        CandidateError: Not all of its entries are finite.
    """
    if not math.isfinite(float(matrix.sum())):
        raise CandidateError("a delta is not finite: look for NaN, infinity or huge weights in the sources")
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_(min=0.0), vectors


def triplets(matrix: Tensor, scale: float | None = None) -> Triplets:
    """Return the singular triplets of a matrix whose values are more than rounding noise.

    Those left out have singular vectors that rounding alone decides. Found from the eigenvectors of the
    smaller Gram matrix, many times faster than an SVD: the squares of all values above `tolerance` are well
    within float64.

    Args:
        matrix: m x k, float64.
        scale: What noise is measured by; None: the largest singular value.

    Raises:
        CandidateError: Not all of its entries are finite.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = triplets(matrix.T, scale)
        return Triplets(turned.right.T, turned.values, turned.left.T)
    left = eigen(matrix @ matrix.T)[1].flip(1)
    rows = left.T @ matrix
    values = torch.linalg.vector_norm(rows, dim=1)
    measure = values[:1] if scale is None else scale
    rank = int((values > tolerance(matrix.shape) * measure).sum())
    return Triplets(left[:, :rank], values[:rank], rows[:rank] / values[:rank, None])


def polar_factor(matrix: Tensor) -> tuple[Tensor, int]:
    """Return the factor `U V^T` of a matrix `U S V^T` over its non-zero singular values, and their number.

    It is the nearest matrix with orthonormal rows or columns where the rank is full, and a partial isometry
    (unique, zero on the null space) where it is not. Two steps of Newton-Schulz take away what the small
    singular values' vectors lack in accuracy.
    """
    found = triplets(matrix)
    factor = found.left @ found.right
    wide = factor if factor.shape[0] <= factor.shape[1] else factor.T
    for _ in range(2):
        wide = 1.5 * wide - 0.5 * (wide @ wide.T) @ wide
    return wide if factor.shape[0] <= factor.shape[1] else wide.T, len(found.values)


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """Return where Adam (Kingma and Ba 2015, without weight decay) gets to from `start`.

    Args:
        start: Any shape, float64; overwritten.
        gradient: Gradient of the loss at a point.
        steps: Number of steps.
        rate: Learning rate.
    """
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    fade, slow_fade = ADAM_MOMENTS
    for step in range(1, steps + 1):
        slope = gradient(start)
        first.lerp_(slope, 1.0 - fade)
        second.mul_(slow_fade).addcmul_(slope, slope, value=1.0 - slow_fade)
        spread = second.sqrt().div_(math.sqrt(1.0 - slow_fade**step)).add_(ADAM_EPSILON)
        start.addcdiv_(first, spread, value=-rate / (1.0 - fade**step))
    return start


def squared_norm(flat: Tensor) -> float:
    """Return the squared Frobenius norm of a float64 tensor, the same for any number of threads."""
    return total(flat.reshape(-1).square())


class MatrixKernel(Kernel):
    """A method that merges the deltas of matrices one way, and those of all other tensors another.

    Prepared is a tuple with one entry per matrix of the tensor, or None for tensors that are no matrices.
    """

    prepared_by: ClassVar[tuple[str, ...]] = ("ends",)

    def takes(self, sources: Sources, values: Values) -> bool:
        """Return whether the tensor is worked on as a matrix."""
        return is_matrix(sources, bool(values.method["ends"]))

    def prepare(self, sources: Sources, values: Values) -> Any:
        """Return what `prepare_matrix` makes of each matrix; None for other tensors."""
        if not self.takes(sources, values):
            return None
        with one_thread():
            return tuple(self.prepare_matrix(matrix, values) for matrix in matrices(sources))

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        if prepared is None:
            self.merge_vector(sources, values, out)
            return
        scale = values.number("lambda")
        with one_thread():
            for matrix, state, part in zip(matrices(sources), prepared, stacked(out), strict=True):
                delta = self.merge_matrix(matrix, state, values)
                part.copy_(matrix.base.double().add_(delta, alpha=scale).float())

    def prepare_matrix(self, matrix: Matrix, values: Values) -> Any:
        """Return the prepared state of one matrix; of `values` it may read what `prepared_by` names."""
        del matrix, values

    @abstractmethod
    def merge_matrix(self, matrix: Matrix, prepared: Any, values: Values) -> Tensor:
        """Return the merged delta of one matrix before `lambda`, float64, out x in."""

    def merge_vector(self, sources: Sources, values: Values, out: Tensor) -> None:
        """Write the merge of a tensor that is no matrix: the base plus the mean of the weighted deltas."""
        add_weighted_deltas(sources, values, values.number("lambda") / len(sources.tensors), out)


def add_weighted_deltas(sources: Sources, values: Values, scale: float, out: Tensor) -> None:
    """Write `theta_0 + scale sum_i w_i tau_i` to `out`, as one sum over the checkpoints themselves."""
    factors = [scale * weight for weight in values.numbers("weight")]
    weighted_sum((sources.given_base, *sources.tensors), (1.0 - math.fsum(factors), *factors), out)
