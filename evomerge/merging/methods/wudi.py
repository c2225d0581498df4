"""Methods that minimise the interference of the merged delta with every source: WUDI-Merging and OptMerge.

Both minimise, over the merged delta t of one matrix, `L(t) = sum_i w_i |(t - T_i) F_i^T|^2` with fixed
targets `T_i` and factors `F_i`. The gradient is `2 (t C - D)` with `C = sum_i w_i F_i^T F_i` and
`D = sum_i w_i T_i F_i^T F_i`, so along an eigenvector of C with eigenvalue c any method that takes steps
against the gradient moves from its start by `g(c)` times the residual `D - t C`, where g depends on c and
the number of steps alone. One eigendecomposition per candidate thus replaces hundreds of products, and as
`g` is bounded nothing is divided by small eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Values, kernel
from evomerge.merging.methods.spectral import kept_rank
from evomerge.merging.methods.subspaces import (
    Matrix,
    MatrixKernel,
    adam,
    eigen,
    squared_norm,
    triplets,
)

WUDI_RATE = 1e-5
OPTMERGE_MOMENTUM = 0.9

Reach = Callable[[Tensor], Tensor]
"""How far, in units of the residual, the way along each eigenvector has led; from the eigenvalues."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """The loss of one matrix as products, each in - the form for tall matrices, float64.

    Attributes:
        squares: For each source `F_i^T F_i`, k x k.
        pulls: For each source `T_i F_i^T F_i`, m x k.
    """

    squares: tuple[Tensor, ...]
    pulls: tuple[Tensor, ...]

    def weighted(self, weights: Sequence[float]) -> Slope:
        """Return the weighted loss."""
        return Slope(_weighted(self.squares, weights), _weighted(self.pulls, weights))


@dataclass(frozen=True, slots=True)
class Factors:
    """The loss of one matrix as factors - the form for matrices wider than all factors are tall, float64.

    Attributes:
        rows: For each source `F_i`, p x k.
        images: For each source `T_i F_i^T`, m x p.
    """

    rows: tuple[Tensor, ...]
    images: tuple[Tensor, ...]

    def weighted(self, weights: Sequence[float]) -> FactoredSlope:
        """Return the weighted loss; weights are not negative."""
        roots = [weight**0.5 for weight in weights]
        return FactoredSlope(
            torch.cat([part * root for part, root in zip(self.rows, roots, strict=True)]),
            torch.cat([part * root for part, root in zip(self.images, roots, strict=True)], dim=1),
        )


@dataclass(frozen=True, slots=True)
class Slope:
    """A weighted loss by C (k x k) and D (m x k)."""

    square: Tensor
    pull: Tensor

    def residual(self, point: Tensor) -> Tensor:
        """Return `D - t C`, minus half the gradient, at a point t."""
        return self.pull - point @ self.square

    def moved(self, start: Tensor, reach: Reach) -> Tensor:
        """Return where the way from `start` leads."""
        values, vectors = eigen(self.square)
        moved: Tensor = (self.residual(start) @ vectors * reach(values)) @ vectors.T
        return moved.add_(start)


@dataclass(frozen=True, slots=True)
class FactoredSlope:
    """A weighted loss by X (P x k) and Y (m x P), where `C = X^T X` and `D = Y X`."""

    rows: Tensor
    images: Tensor

    def _coefficients(self, point: Tensor) -> Tensor:
        return self.images - point @ self.rows.T

    def residual(self, point: Tensor) -> Tensor:
        """Return `D - t C`, minus half the gradient, at a point t."""
        return self._coefficients(point) @ self.rows

    def moved(self, start: Tensor, reach: Reach) -> Tensor:
        """Return where the way from `start` leads; the eigenvectors are those of the smaller X X^T."""
        values, vectors = eigen(self.rows @ self.rows.T)
        moved = (self._coefficients(start) @ vectors * reach(values)) @ vectors.T
        return torch.addmm(start, moved, self.rows)


def quadratic(rows: Sequence[Tensor], images: Sequence[Tensor]) -> Curvature | Factors:
    """Return the loss with these factors and images in the form with the smaller eigenproblem."""
    if sum(len(part) for part in rows) < rows[0].shape[1]:
        return Factors(tuple(rows), tuple(images))
    pairs = zip(images, rows, strict=True)
    return Curvature(tuple(part.T @ part for part in rows), tuple(image @ part for image, part in pairs))


def _weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    merged = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        merged.add_(part, alpha=weight)
    return merged


def flow(time: float) -> Reach:
    """Return the reach of gradient flow, `(1 - exp(-c t)) / c`, which is t where the loss is flat."""

    def reach(values: Tensor) -> Tensor:
        safe = values.clamp(min=torch.finfo(values.dtype).tiny)
        return torch.where(values * time > 0, -torch.expm1(-values * time) / safe, time)

    return reach


def heavy_ball(steps: int, rate: float, momentum: float) -> Reach:
    """Return the reach of gradient descent with momentum, as in torch's SGD, after so many steps."""

    def reach(values: Tensor) -> Tensor:
        position, speed = torch.zeros_like(values), torch.zeros_like(values)
        for _ in range(steps):
            speed.mul_(momentum).add_(2.0 - 2.0 * values * position)
            position.add_(speed, alpha=rate)
        return position

    return reach


@kernel("wudi")
class Wudi(MatrixKernel):
    """WUDI-Merging: targets are the deltas, factors the deltas over their norm; the start is their sum."""

    def prepare_matrix(self, matrix: Matrix, values: Values) -> Curvature | Factors:  # noqa: D102
        rows, images = [], []
        for delta in matrix.deltas():
            norm = squared_norm(delta) ** 0.5
            rows.append(delta / norm if norm else delta)
            images.append(delta @ rows[-1].T)
        return quadratic(rows, images)

    def merge_matrix(self, matrix: Matrix, prepared: Any, values: Values) -> Tensor:  # noqa: D102
        weights = values.numbers("weight")
        slope, start = prepared.weighted(weights), matrix.weighted(weights)
        steps = values.number("steps")
        if values.method["solver"] == "flow":
            moved: Tensor = slope.moved(start, flow(steps))
            return moved
        return adam(start, lambda point: slope.residual(point).mul_(-2.0), round(steps), WUDI_RATE)


@kernel("optmerge")
class OptMerge(MatrixKernel):
    """OptMerge: targets are the deltas at low rank, factors their `S V`; the start is the deltas' mean."""

    prepared_by = ("ends", "rank")

    def prepare_matrix(self, matrix: Matrix, values: Values) -> Curvature | Factors:  # noqa: D102
        rows, images = [], []
        count = kept_rank(values.number("rank"), matrix.side, len(matrix.tensors))
        for delta in matrix.deltas():
            norm = squared_norm(delta) ** 0.5
            top = triplets(delta).first(count)
            scaled = top.values / norm if norm else top.values
            rows.append(scaled[:, None] * top.right)
            images.append(top.left * top.values * scaled)
        return quadratic(rows, images)

    def merge_matrix(self, matrix: Matrix, prepared: Any, values: Values) -> Tensor:  # noqa: D102
        weights = values.numbers("weight")
        start = matrix.weighted([weight / len(weights) for weight in weights])
        rate, steps = values.number("learning_rate"), round(values.number("steps"))
        moved: Tensor = prepared.weighted(weights).moved(start, heavy_ball(steps, rate, OPTMERGE_MOMENTUM))
        return moved
