"""The kinds of dimension that optimizers vary: the one thing they know of a space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Dimension:
    """One number of a genome.

    A genome holds one float per dimension: a real dimension is in the unit interval [0, 1], which the space
    maps to its own bounds, linearly or by logarithm; an integer or categorical one is a whole number in
    0..size-1. Integers have an order that optimizers use, categories have none.

    Attributes:
        label: Its name for people, unique within a space.
        kind: `real`, `integer` or `categorical`.
        size: How many values an integer or categorical dimension has, at least 1; 0 for a real one.

    Raises:
        ValueError: Another kind, or a size that does not fit the kind.
    """

    label: str
    kind: Literal["real", "integer", "categorical"]
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("real", "integer", "categorical"):
            raise ValueError(f'dimension {self.label}: unknown kind "{self.kind}"')
        if (self.size != 0) if self.kind == "real" else (self.size < 1):
            raise ValueError(f"dimension {self.label}: a {self.kind} dimension cannot have size {self.size}")

    @property
    def free(self) -> bool:
        """Whether it has more than one value."""
        return self.size != 1

    def holds(self, value: float) -> bool:
        """Return whether the value is one of its values, in the genome's coding."""
        if self.kind == "real":
            return 0.0 <= value <= 1.0
        return 0 <= value < self.size and value == int(value)


def check_genome(dimensions: Sequence[Dimension], genome: Sequence[float]) -> None:
    """Raise ValueError unless the genome has one value per dimension, each within its coding."""
    if len(genome) != len(dimensions):
        raise ValueError(f"a genome of {len(genome)} numbers, expected {len(dimensions)}")
    for dimension, value in zip(dimensions, genome, strict=True):
        if not dimension.holds(value):
            raise ValueError(f"{dimension.label}: {value} is not a value of a {dimension.kind} dimension")
