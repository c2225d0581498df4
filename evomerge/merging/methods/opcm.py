"""Orthogonal projection-based continual merging: sources are merged in one after another.

With X the sum of all that was merged in so far, a source adds the part of its delta that lies outside the
leading singular directions of X and off the diagonal in all of them. The published method rescales the
whole model after each source and undoes it before the next; as singular directions do not depend on scale,
X can be built tensor by tensor and scaled once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Kernel, Sources, Values, View, kernel
from evomerge.merging.methods.subspaces import (
    add_weighted_deltas,
    is_matrix,
    matrices,
    one_thread,
    squared_norm,
    stacked,
    triplets,
)

ROUNDING = 1e-9
"""By what share of all singular values their running sum may miss `alpha` through rounding."""

CHUNK = 1 << 22
"""Entries of a tensor whose norms are added up in one go."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Prepared state of one tensor.

    Attributes:
        delta: Its sum X, count x out x in, float32; None for tensors whose deltas are merely added.
        square: Squared Frobenius norm of X.
        squares: Squared norms of the sources' weighted deltas.
    """

    delta: Tensor | None
    square: float
    squares: tuple[float, ...]


def projected(merged: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """Return the part of a delta that is new to what was merged so far.

    With `merged = U S V^T` and `P = U^T delta V`, the diagonal of P and its leading r x r block are removed,
    where r counts the leading singular values that together make up at most `alpha` of their sum.

    Args:
        merged: m x k, float64.
        delta: m x k, float64.
        alpha: Share of the singular values whose directions are closed, 0 to 1.
    """
    directions = triplets(merged)
    sums = directions.values.cumsum(0)
    if not sums.numel():
        return delta
    closed = int((sums <= (alpha + ROUNDING) * sums[-1]).sum())
    left, right = directions.left, directions.right.T
    diagonal = ((left.T @ delta) * right.T).sum(dim=1)
    block = left[:, :closed].T @ delta @ right[:, :closed]
    block.fill_diagonal_(0.0)
    removed = (left * diagonal) @ right.T
    removed += left[:, :closed] @ block @ right[:, :closed].T
    return delta - removed


def _chunks(sources: Sources) -> Iterator[list[Tensor]]:
    """Yield the flat deltas of all sources, float64, a part of the tensor at a time."""
    base, *tensors = (
        torch.split(tensor.view(-1), CHUNK) for tensor in (sources.given_base, *sources.tensors)
    )
    for start, *parts in zip(base, *tensors, strict=True):
        yield [part.double().sub_(start) for part in parts]


@kernel("opcm")
class OPCM(Kernel):
    """`theta_0 + lambda s X`, with s such that the model's delta is as long as the sources' on average."""

    prepared_by = ("ends", "alpha", "weight")

    def prepare(self, sources: Sources, values: Values) -> Merged:
        """Return the sum X of one tensor, and what the scale of the whole model needs to know of it."""
        weights = values.numbers("weight")
        if not is_matrix(sources, bool(values.method["ends"])):
            return _added(sources, weights)
        made, squares = [], [0.0] * len(weights)
        with one_thread():
            for matrix in matrices(sources):
                merged = torch.zeros_like(matrix.base, dtype=torch.float64)
                for i, (delta, weight) in enumerate(zip(matrix.deltas(), weights, strict=True)):
                    delta.mul_(weight)
                    squares[i] += squared_norm(delta)
                    merged += projected(merged, delta, values.number("alpha"))
                made.append(merged)
        stack = torch.stack(made)
        return Merged(stack.float(), squared_norm(stack), tuple(squares))

    def whole(self, tensors: Sequence[View]) -> float:
        """Return the factor s of the whole model: the sources' mean norm over that of X."""
        found = [_squares(tensor.prepared()) for tensor in tensors]  # not the states: they need not be kept
        norm, *lengths = (math.sqrt(math.fsum(squares)) for squares in zip(*found, strict=True))
        return math.fsum(lengths) / len(lengths) / norm if norm else 0.0

    def merge(self, sources: Sources, prepared: Merged, values: Values, out: Tensor) -> None:  # noqa: D102
        scale = values.number("lambda") * values.whole
        if prepared.delta is None:
            add_weighted_deltas(sources, values, scale, out)
            return
        parts: Any = zip(stacked(sources.given_base), prepared.delta, stacked(out), strict=True)
        for base, delta, part in parts:
            part.copy_(torch.add(base.float(), delta, alpha=scale))


def _squares(state: Merged) -> tuple[float, ...]:
    return (state.square, *state.squares)


def _added(sources: Sources, weights: Sequence[float]) -> Merged:
    """Return the state of a tensor whose deltas are added without projection."""
    squares: list[list[float]] = [[] for _ in weights]
    square = []
    for deltas in _chunks(sources):
        parts = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
        for part, found in zip(parts, squares, strict=True):
            found.append(squared_norm(part))
        square.append(squared_norm(torch.stack(parts).sum(dim=0)))
    return Merged(None, math.fsum(square), tuple(math.fsum(found) for found in squares))
