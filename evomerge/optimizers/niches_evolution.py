"""M2N2's step: two parents from the archive, a child of them, and its place among those who live.

"Competition and Attraction Improve Model Fusion" (arXiv 2508.16204, GECCO 2025). The same code breeds the
plain vectors of the paper's classifiers and the segment tables of language models.
"""

from __future__ import annotations

import numpy as np

from evomerge.optimizers.niches_archive import Archive
from evomerge.optimizers.niches_crossover import Angle, cross, draw_cuts
from evomerge.optimizers.niches_sharing import Array
from evomerge.spaces.cells import Cells, Table


class Evolution:
    """Breeds and keeps individuals, one at a time.

    Args:
        cells: What individuals are tables over.
        archive: Where they live; must be empty.
        crossover: False: a child is a mutated copy of one parent.
        split_point: False: the whole child lies at one mixing ratio.
        angle: See `cross`.
        mutation: Standard deviation of what is added to every entry of a child; 0: nothing.
    """

    def __init__(
        self,
        cells: Cells,
        archive: Archive,
        *,
        crossover: bool = True,
        split_point: bool = True,
        angle: Angle = "global",
        mutation: float = 0.0,
    ) -> None:
        self.cells, self.archive = cells, archive
        self._crossover, self._split_point, self._angle = crossover, split_point, angle
        self._mutation = mutation
        self.tables: dict[int, Table] = {}

    def breed(self, random: np.random.Generator) -> tuple[Table, tuple[int, ...]]:
        """Return a child of those who live, and its parents: one if only mutated. Somebody must live."""
        first, second = self.archive.parents(random)
        if not self._crossover:
            return self._mutated(self.tables[first], random), (first,)
        cuts = draw_cuts(self.cells, random, split_point=self._split_point)
        child = cross(self.tables[first], self.tables[second], self.cells, cuts, self._angle)
        return self._mutated(child, random), (first, second)

    def add(self, number: int, table: Table, scores: Array) -> int | None:
        """Let an individual in; return who leaves, perhaps itself, or None."""
        self.tables[number] = table
        left = self.archive.add(number, scores)
        if left is not None:
            del self.tables[left]
        return left

    def _mutated(self, table: Table, random: np.random.Generator) -> Table:
        if not self._mutation:
            return table
        kind = np.float32 if table.dtype == np.float32 else np.float64
        noise = random.standard_normal(table.shape, dtype=kind)
        noise *= kind(self._mutation)
        noise += table
        return noise
