"""What a source keeps of its delta, and how the kept parts become one: plain numbers for the loops to read.

Entries are compared as the bits of their float32 magnitudes, which are ordered as the magnitudes are. Of
equal magnitudes those come first whose index, times the golden ratio, has the smaller fractional part: a
fixed, even sample of them, wherever in the tensor they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

GOLDEN = 2654435769
"""2**32 times the fractional part of the golden ratio."""

ABOVE_ALL = 0x7FFFFFFF
"""Bits of a cut that no entry is above."""

DRAWS = 2**24
"""Number of values of a draw."""

SMALLEST_DIVISOR = 1e-8
"""Weights that sum to less are not divided by."""


class Cut(NamedTuple):
    """A place in the order of magnitudes; what is greater lies above it.

    Attributes:
        bits: Bits of a magnitude.
        share: Share of the entries equal to it that lies above the cut too, times 2**32.
    """

    bits: int
    share: int


NONE_ABOVE = Cut(ABOVE_ALL, 0)
ALL_ABOVE = Cut(0, 0)
"""Zeros lie below it; whether they are kept makes no difference."""


@dataclass(frozen=True, slots=True)
class Band:
    """Keep the entries above one cut and not above another, times a factor."""

    factor: float
    low: Cut
    high: Cut = NONE_ABOVE


@dataclass(frozen=True, slots=True)
class Draw:
    """Keep entries whose draw is below a limit, times a factor.

    Attributes:
        factor: What kept entries are multiplied by.
        keys: Two 32-bit keys of the draws.
        limit: 0 to `DRAWS`.
    """

    factor: float
    keys: tuple[int, int]
    limit: int


@dataclass(frozen=True, slots=True)
class Graded:
    """Keep entries with a probability of `lowest + step * code`, times a factor.

    Attributes:
        factor: What kept entries are multiplied by.
        keys: Two 32-bit keys of the draws.
        codes: A code for each entry, uint16, flat.
        lowest: Probability at code 0.
        step: What one step of the code adds.
        inverse: Whether kept entries are divided by their probability.
    """

    factor: float
    keys: tuple[int, int]
    codes: Tensor
    lowest: float
    step: float
    inverse: bool


Keep = Band | Draw | Graded


@dataclass(frozen=True, slots=True)
class Election:
    """How thinned deltas become one.

    Attributes:
        votes: Whether only those count that have the sign of the sum.
        divides: Whether the sum of those that count is divided by their weights.
        tie: Sign that a sum of zero elects, 1 or -1.
    """

    votes: bool
    divides: bool = False
    tie: int = 1
