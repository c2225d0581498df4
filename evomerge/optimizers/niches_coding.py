"""What breeding needs to know of a space: how its genomes are tables over cells, and where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from evomerge.optimizers.random_search import uniform_genome
from evomerge.records import Genome
from evomerge.seeding import stream
from evomerge.spaces.cells import Cells, Table
from evomerge.spaces.dimensions import Dimension


class Coding(Protocol):
    """Genomes as tables.

    Attributes:
        cells: What the tables are over.
    """

    cells: Cells

    @property
    def origins(self) -> Sequence[Genome]:
        """Genomes that every search begins with, such as the sources; often none."""

    def table(self, genome: Genome) -> Table:
        """Return a genome's table.

        Raises:
            ValueError: It is no genome of this space.
        """

    def genome(self, table: Table) -> Genome:
        """Return the genome of a table; one whose table is near to the given one where none is equal."""


class BoxCoding:
    """Genomes of numbers: a table of one column, every dimension scaled to [0, 1].

    Args:
        dimensions: Of the genomes.
        seed: Of what is drawn.
    """

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        self.cells = Cells.vector(len(dimensions))
        self.origins: Sequence[Genome] = ()
        self._dimensions, self._seed = tuple(dimensions), seed
        self._spans = np.array([float(max(d.size - 1, 1)) if d.size else 1.0 for d in dimensions])
        self._categories = np.flatnonzero([d.kind == "categorical" for d in dimensions])

    def table(self, genome: Genome) -> Table:
        """Return a genome's table."""
        return np.asarray(np.array(genome) / self._spans)[:, None]

    def genome(self, table: Table) -> Genome:
        """Return the genome nearest to a table."""
        numbers = np.clip(table[:, 0], 0.0, 1.0) * self._spans
        return tuple(
            float(number) if dimension.kind == "real" else float(min(round(number), dimension.size - 1))
            for dimension, number in zip(self._dimensions, numbers.tolist(), strict=True)
        )

    def drawn(self, index: int) -> Genome:
        """Return a uniform draw."""
        return uniform_genome(self._dimensions, self._seed, "niches", "founder", index)

    def settled(self, child: Table, parents: Sequence[Table], index: int, mutation: float) -> Table:
        """Return a child whose categories are each one parent's, or drawn with the chance of a mutation."""
        if not len(self._categories):
            return child
        random, child = stream(self._seed, "niches", "categories", index), child.copy()
        for place in self._categories:
            heirs = sorted((abs(float(child[place, 0] - p[place, 0])), i) for i, p in enumerate(parents))
            child[place] = parents[heirs[0][1]][place]
            if random.random() < mutation:
                child[place] = random.integers(self._dimensions[place].size) / self._spans[place]
        return child
