"""Crossing two individuals: the child takes after one before a split point and after the other behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.spaces.cells import Cells, Table

Angle = Literal["global", "per_segment", "none"]

STRAIGHT = 1e-6
"""At a sine of the angle up to this, two individuals are mixed along a straight line."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one chromosome of a child was made.

    Attributes:
        share: The second parent's share before the split point; behind it, the first's.
        split: The cell the chromosome is split in front of.
    """

    share: float
    split: int


def draw_cuts(cells: Cells, random: np.random.Generator, *, split_point: bool) -> tuple[Cut, ...]:
    """Draw a mixing ratio and a split point for each chromosome; without split points, their starts."""
    cuts = []
    for chromosome in cells.chromosomes:
        share = float(random.random())
        place = int(random.integers(len(chromosome.splits))) if split_point else 0
        cuts.append(Cut(share, int(chromosome.splits[place]) if split_point else chromosome.start))
    return tuple(cuts)


def cross(first: Table, second: Table, cells: Cells, cuts: Sequence[Cut], angle: Angle) -> Table:
    """Return the child of two individuals.

    Before the split point it is the point at `share` on the way from the first to the second, behind it the
    one at `1 - share`.

    Args:
        first: A parent.
        second: The other one, of the same shape.
        cells: What they are tables over.
        cuts: One for each chromosome.
        angle: The way is a great circle (SLERP) by the angle between the two whole individuals, as in the
            published code, or by the angle in each part, as in the paper's formula; `none` is a straight
            line.
    """
    child = np.empty_like(first)
    whole = cells.angle(first, second) if angle == "global" else 0.0
    for chromosome, cut in zip(cells.chromosomes, cuts, strict=True):
        before, behind = slice(chromosome.start, cut.split), slice(cut.split, chromosome.stop)
        for part, share in ((before, cut.share), (behind, 1.0 - cut.share)):
            if part.start == part.stop:
                continue
            between = cells.angle(first, second, part) if angle == "per_segment" else whole
            mine, other = slerp_factors(share, between)
            child[part] = mine * first[part] + other * second[part]
    return child


def slerp_factors(share: float, angle: float) -> tuple[float, float]:
    """Return the factors of two vectors at an angle for the point at `share` on the arc between them."""
    sine = math.sin(angle)
    if sine <= STRAIGHT:
        return 1.0 - share, share
    return math.sin((1.0 - share) * angle) / sine, math.sin(share * angle) / sine
