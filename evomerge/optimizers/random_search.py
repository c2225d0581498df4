"""Uniform random search: the baseline every other optimizer has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.optimizers.base import SteadyOptimizer
from evomerge.optimizers.settings import RandomSettings
from evomerge.records import Genome
from evomerge.seeding import stream
from evomerge.spaces.dimensions import Dimension


class RandomSearch(SteadyOptimizer):
    """Proposes the start genome, if there is one, and then uniform draws; outcomes change nothing."""

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        seed: int,
        settings: RandomSettings | None = None,
        start: Genome | None = None,
    ) -> None:
        super().__init__(dimensions, seed, start)
        self._start = start

    def _draw(self, index: int) -> tuple[int, Genome]:
        if index == 0 and self._start is not None:
            return index, tuple(map(float, self._start))
        return index, uniform_genome(self.dimensions, self.seed, "random", index)


def uniform_genome(dimensions: Sequence[Dimension], seed: int, *purpose: str | int) -> Genome:
    """Return a uniform draw from the box, from the stream of that purpose."""
    draws = stream(seed, *purpose).random(len(dimensions))
    return tuple(
        float(draw) if dimension.kind == "real" else float(int(draw * dimension.size))
        for dimension, draw in zip(dimensions, draws, strict=True)
    )
