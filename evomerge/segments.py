"""Segment tables: coefficients of the sources that change along the flattened parameters. No torch.

The floating tensors of a model, one behind the other in the checkpoint's order, are one long vector. A
table says at which of its entries a new segment starts, and what each source's coefficient is from there
on. Several tables may share out the tensors by role; each then counts the entries of its own tensors.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from evomerge.errors import RecipeError
from evomerge.records import Place, Role
from evomerge.strict import StrictModel


class SegmentTable(StrictModel):
    """The coefficients of the sources along some of the tensors.

    Attributes:
        roles: Roles of its tensors; empty: all that no table before it has.
        starts: The entry at which each segment starts, ascending from 0.
        coefficients: One for each source, for each segment.
    """

    roles: tuple[Role, ...] = ()
    starts: tuple[int, ...] = Field(min_length=1)
    coefficients: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.coefficients) != len(self.starts):
            raise ValueError(
                f"{len(self.starts)} starts, but coefficients of {len(self.coefficients)} segments"
            )
        if self.starts[0] != 0:
            raise ValueError(f"starts: expected 0 first, got {self.starts[0]}")
        for before, start in zip(self.starts, self.starts[1:], strict=False):
            if start <= before:
                raise ValueError(f"starts: expected ascending numbers, got {start} after {before}")
        return self

    def merged(self) -> SegmentTable:
        """Return it with neighbours of equal coefficients as one segment, which is the same model."""
        kept = [i for i, row in enumerate(self.coefficients) if i == 0 or row != self.coefficients[i - 1]]
        return self.model_copy(
            update={
                "starts": tuple(self.starts[i] for i in kept),
                "coefficients": tuple(self.coefficients[i] for i in kept),
            }
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries of one flat tensor that have the same coefficients."""

    start: int
    stop: int
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a tensor lies: in which table, and from which of its entries on."""

    table: int
    start: int


def stretches(
    places: Sequence[Place], sizes: Mapping[str, int], roles: Sequence[Sequence[Role]]
) -> tuple[dict[str, Stretch], tuple[int, ...]]:
    """Return where each tensor lies, and how many entries each table has.

    Args:
        places: The floating tensors in the model's order.
        sizes: Entries of each by name.
        roles: For each table its roles; empty: what is left.

    Raises:
        RecipeError: A tensor is in no table.
    """
    found: dict[str, Stretch] = {}
    filled = [0] * len(roles)
    for place in places:
        table = next((i for i, wanted in enumerate(roles) if not wanted or place.role in wanted), None)
        if table is None:
            raise RecipeError(
                f'segments: {place.name} ("{place.role}") is in no table; give the last one no roles'
            )
        found[place.name] = Stretch(table, filled[table])
        filled[table] += sizes[place.name]
    return found, tuple(filled)


def pieces(table: SegmentTable, start: int, size: int) -> tuple[Piece, ...]:
    """Return the segments that a tensor lies in, in entries of the tensor.

    Args:
        table: The tensor's table.
        start: Its first entry in the table.
        size: Its number of entries.
    """
    found = []
    at = bisect.bisect_right(table.starts, start) - 1
    done = 0
    while done < size:
        end = table.starts[at + 1] - start if at + 1 < len(table.starts) else size
        end = min(end, size)
        found.append(Piece(done, end, table.coefficients[at]))
        done, at = end, at + 1
    return tuple(found)


def check_segments(tables: Sequence[SegmentTable], sources: Sequence[str]) -> None:
    """Raise RecipeError unless every table has a coefficient for each source, and its roles to itself."""
    taken: set[str] = set()
    for i, table in enumerate(tables):
        where = f"segments.{i}"
        for row in table.coefficients:
            if len(row) != len(sources):
                raise RecipeError(
                    f"{where}.coefficients: expected one for each of {', '.join(sources)}, got {len(row)}"
                )
        if not table.roles and i < len(tables) - 1:
            raise RecipeError(f"{where}.roles: only the last table may leave them out, as it takes the rest")
        twice = next((role for role in table.roles if role in taken), None)
        if twice is not None:
            raise RecipeError(f'{where}.roles: "{twice}" belongs to a table before it')
        taken |= set(table.roles)


def identity(tables: Sequence[SegmentTable]) -> list[Any]:
    """Return what a recipe's digest sees of its tables."""
    return [[list(t.roles), list(t.starts), [list(row) for row in t.coefficients]] for t in tables]
