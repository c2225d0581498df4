"""Lengths of tensors and angles between them, as a whole or slice by slice, in float64.

Sums come out the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from evomerge.merging.blocks import BLOCK_ELEMENTS, ROW_ELEMENTS
from evomerge.merging.methods.base import Sources

ACCELERATOR_ELEMENTS = 1 << 24
"""Elements worked on at a time where no CPU's threads divide them."""


@dataclass(frozen=True, slots=True)
class Rays:
    """One tensor's sources as vectors from the origin, or from the base.

    Attributes:
        lengths: Their N Euclidean norms.
        cosines: N by N; 1 on the diagonal, 0 beside a tensor of zeros.
    """

    lengths: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]


def rays(sources: Sources) -> Rays:
    """Return lengths and cosines of the flat sources, or of their deltas if there is a base.

    Sums are float64 over rows of `ROW_ELEMENTS` and exact over rows, so threads change nothing.
    """
    vectors = [tensor.view(-1) for tensor in sources.tensors]
    base = None if sources.base is None else sources.base.view(-1)
    pairs = list(combinations_with_replacement(range(len(vectors)), 2))
    parts: list[list[float]] = [[] for _ in pairs]
    longest = max((part.stop - part.start for part, _ in _rows(vectors[0])), default=0)
    scratch = torch.empty((len(vectors) + 1, longest), dtype=torch.float64, device=vectors[0].device)
    for part, width in _rows(vectors[0]):
        *wide, product = scratch[:, : part.stop - part.start]
        for vector, copy in zip(vectors, wide, strict=True):
            copy.copy_(vector[part])
            if base is not None:
                copy.sub_(base[part])
        sums = [torch.mul(wide[i], wide[j], out=product).view(-1, width).sum(dim=1) for i, j in pairs]
        for known, new in zip(parts, torch.stack(sums).tolist(), strict=True):
            known += new
    dots = {pair: math.fsum(known) for pair, known in zip(pairs, parts, strict=True)}
    every = range(len(vectors))
    lengths = tuple(math.sqrt(dots[i, i]) for i in every)
    return Rays(lengths, tuple(tuple(_cosine(dots, lengths, i, j) for j in every) for i in every))


def _cosine(dots: dict[tuple[int, int], float], lengths: Sequence[float], i: int, j: int) -> float:
    if i == j:
        return 1.0
    product = lengths[i] * lengths[j]
    return min(1.0, max(-1.0, dots[min(i, j), max(i, j)] / product)) if product else 0.0


def _rows(vector: Tensor) -> Iterator[tuple[slice, int]]:
    """Yield the parts of a flat tensor to add up at a time, each with the width of its rows."""
    count = vector.numel()
    whole = count // ROW_ELEMENTS * ROW_ELEMENTS
    step = 16 * ROW_ELEMENTS if vector.device.type == "cpu" else ACCELERATOR_ELEMENTS
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole)), ROW_ELEMENTS
    if whole < count:
        yield slice(whole, count), count - whole


@dataclass(frozen=True, slots=True)
class Slices:
    """A tensor as a matrix, whose rows or columns are the slices that angles are taken of.

    Attributes:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        dim: The dimension that a slice extends in: 1 for rows, 0 for columns.
    """

    rows: int
    columns: int
    dim: int

    @classmethod
    def of(cls, tensor: Tensor, first: bool = False) -> Slices:
        """Return a tensor's slices along its last dimension, or along its first one."""
        shape = tuple(tensor.shape) or (1,)
        if first:
            return cls(shape[0], math.prod(shape[1:]), 0)
        return cls(math.prod(shape[:-1]), shape[-1], 1)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor as the matrix."""
        return tensor.view(self.rows, self.columns)

    def blocks(self, most: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        """Yield parts of the matrix of at most so many elements on a CPU."""
        most = most if device.type == "cpu" else ACCELERATOR_ELEMENTS
        width = max(1, min(self.columns, most))
        height = max(1, most // width)
        for top in range(0, self.rows, height):
            for left in range(0, self.columns, width):
                yield slice(top, min(top + height, self.rows)), slice(left, min(left + width, self.columns))

    def dots(self, sources: Sources, i: int, j: int) -> Tensor:
        """Return each slice's product of two sources, or of their deltas if there is a base, in float64.

        Blocks are too small for torch to divide them among threads.
        """
        base = None if sources.base is None else self.matrix(sources.base)
        one, other = (self.matrix(sources.tensors[k]) for k in (i, j))
        count = self.rows if self.dim == 1 else self.columns
        sums = torch.zeros(count, dtype=torch.float64, device=one.device)
        for part in self.blocks(ROW_ELEMENTS, one.device):
            first, second = one[part].double(), other[part].double()
            if base is not None:
                first, second = first - base[part], second - base[part]
            sums[part[1 - self.dim]] += (first * second).sum(dim=self.dim)
        return sums

    def weighted_sum(self, tensors: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor) -> None:
        """Write the sum of the tensors, each slice times its factor, to `out`, accumulated in float32.

        Args:
            tensors: Of one shape.
            factors: For each tensor one factor per slice.
            out: Of that shape.
        """
        matrices, result = [self.matrix(tensor) for tensor in tensors], self.matrix(out)
        spread = [factor.float().unsqueeze(self.dim).expand(self.rows, self.columns) for factor in factors]
        for part in self.blocks(BLOCK_ELEMENTS, out.device):
            merged = matrices[0][part].float() * spread[0][part]
            for matrix, factor in zip(matrices[1:], spread[1:], strict=True):
                merged += matrix[part].float() * factor[part]
            result[part].copy_(merged)
