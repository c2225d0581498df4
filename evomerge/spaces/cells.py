"""The flattened parameters cut into cells, and the geometry of individuals that are tables over them.

An individual is a table, one row per cell and one coefficient per source: its weights in a cell are that mix
of the sources' weights. Lengths and angles need nothing of the sources but the scalar products of every pair
of them within each cell, so that nothing here ever reads a weight. A plain vector is the table of one column
whose every entry is a cell of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[Any]
Grams = NDArray[np.float64]


@dataclass(frozen=True)
class Chromosome:
    """Cells that lie together and are split at one point of their own.

    Attributes:
        start: Its first cell.
        stop: The one behind its last.
        splits: The cells it may be split in front of; its first one means that it is not split.
    """

    start: int
    stop: int
    splits: NDArray[np.int64]


class Cells:
    """The flattened parameters, cut into cells.

    Args:
        chromosomes: They cover all cells in order.
        find_grams: Returns the scalar products of the sources in each cell, (cells, sources, sources), when
            they are first needed; None: tables are vectors, whose entries are orthogonal and of length 1.
    """

    def __init__(
        self, chromosomes: Sequence[Chromosome], find_grams: Callable[[], Grams] | None = None
    ) -> None:
        self.chromosomes = tuple(chromosomes)
        self.count = self.chromosomes[-1].stop
        self._find_grams = find_grams

    @classmethod
    def vector(cls, count: int) -> Cells:
        """Return the cells of a plain vector of so many numbers, which may be split anywhere."""
        return cls((Chromosome(0, count, np.arange(count)),))

    @cached_property
    def grams(self) -> Grams | None:
        """Scalar products of the sources in each cell; None for plain vectors."""
        return None if self._find_grams is None else self._find_grams()

    def product(self, one: Table, other: Table, part: slice = slice(None)) -> float:
        """Return the scalar product of the weights of two individuals in some of the cells."""
        if self.grams is None:
            return float(np.vdot(one[part], other[part]))
        return float(np.einsum("ci,cij,cj->", one[part], self.grams[part], other[part]))

    def angle(self, one: Table, other: Table, part: slice = slice(None)) -> float:
        """Return the angle between two individuals in radians; 0 if one of them is zero there."""
        lengths = self.product(one, one, part) * self.product(other, other, part)
        if not lengths > 0.0:
            return 0.0
        cosine = self.product(one, other, part) / math.sqrt(lengths)
        return math.acos(min(1.0, max(-1.0, cosine)))

    def starts(self, table: Table) -> NDArray[np.int64]:
        """Return the cells at which a segment starts: a chromosome, or other coefficients than before."""
        changes = np.flatnonzero((table[1:] != table[:-1]).any(axis=1)) + 1
        return np.union1d(changes, [chromosome.start for chromosome in self.chromosomes])

    @cached_property
    def widest(self) -> float:
        """The largest distance between two sources; 0 if there is but one."""
        if self.grams is None:
            return 0.0
        total = self.grams.sum(axis=0)
        lengths = np.diag(total)
        squares = lengths[:, None] + lengths[None, :] - 2.0 * total
        return math.sqrt(max(0.0, float(squares.max())))

    def simplified(self, table: Table, most: int, error: float) -> tuple[Table, float]:
        """Return a table of fewer segments, and how far it may be from the given one.

        Neighbours whose merging changes the weights least are merged, two at a time, until there are `most`
        segments or the next would exceed the error.

        Args:
            table: Over these cells, which must have scalar products.
            most: Segments wanted, at least.
            error: Bound on the Euclidean distance of the weights, as a share of `widest`.

        Returns:
            The table, and a bound on its distance as a share of `widest`, at most `error`; 0 if it is the
            given one.
        """
        starts = self.starts(table)
        if len(starts) <= most or self.grams is None or not self.widest:
            return table, 0.0
        merging = _Merging(table[starts], np.add.reduceat(self.grams, starts, axis=0))
        firsts = {chromosome.start for chromosome in self.chromosomes}
        joints = [int(start) not in firsts for start in starts]
        squared = merging.run(joints, most, (error * self.widest) ** 2)
        kept = np.flatnonzero(merging.kept)
        lengths = np.diff([*starts[kept], self.count])
        return np.repeat(merging.rows[kept], lengths, axis=0), math.sqrt(squared) / self.widest


class _Merging:
    """Segments being merged with the ones before them.

    Every segment carries a bound on how far it is from what it was made of. A merge moves both parts to their
    mean, weighted by their lengths; by the triangle inequality the ways add up within a part, and the parts
    are orthogonal.
    """

    def __init__(self, rows: Table, grams: Grams) -> None:
        self.rows, self.kept = rows.copy(), np.ones(len(rows), dtype=bool)
        self._grams = grams.copy()
        self._errors = np.zeros(len(rows))

    def run(self, joints: Sequence[bool], most: int, bound: float) -> float:
        """Merge until few are left or the squared error would exceed the bound; return the squared error."""
        costs = {i: self._cost(self._before(i), i) for i, free in enumerate(joints) if free}
        total = 0.0
        while int(self.kept.sum()) > most and costs:
            place = min(costs, key=lambda i: (costs[i][0], i))
            added, mean = costs.pop(place)
            if total + added > bound:
                break
            before = self._before(place)
            squared = float(self._errors[before] ** 2 + self._errors[place] ** 2) + added
            self._errors[before], self.rows[before] = math.sqrt(squared), mean
            self._grams[before] += self._grams[place]
            self.kept[place] = False
            total += added
            for near in (before, self._behind(place)):
                if near in costs:
                    costs[near] = self._cost(self._before(near), near)
        return total

    def _cost(self, before: int, place: int) -> tuple[float, Table]:
        """Return by how much a merge raises the bound on the squared error, and the merged row."""
        weights = np.array([np.trace(self._grams[i]) for i in (before, place)])
        whole = float(weights.sum())
        shares = weights / whole if whole > 0.0 else np.array([0.5, 0.5])
        mean = shares[0] * self.rows[before] + shares[1] * self.rows[place]
        added = 0.0
        for i in (before, place):
            way = self.rows[i] - mean
            step = math.sqrt(max(0.0, float(way @ self._grams[i] @ way)))
            added += (self._errors[i] + step) ** 2 - self._errors[i] ** 2
        return added, mean

    def _before(self, place: int) -> int:
        return int(np.flatnonzero(self.kept[:place])[-1])

    def _behind(self, place: int) -> int:
        later = np.flatnonzero(self.kept[place + 1 :])
        return place + 1 + int(later[0]) if len(later) else len(self.kept)
