"""Who lives: archives of a fixed size in which individuals compete, or a grid of elites.

An archive knows individuals by number and by their scores on every document, and nothing of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from evomerge.optimizers.niches_sharing import Array, attraction, binary_only, plain_fitness, worth


class Archive(Protocol):
    """What breeding asks of an archive."""

    @property
    def numbers(self) -> list[int]:
        """Who lives, in order of arrival."""

    @property
    def scores(self) -> Array:
        """Their scores, (individuals, documents), in the same order."""

    def fitness(self) -> Array:
        """Return what parents are drawn in proportion to, in the same order."""

    def add(self, number: int, scores: Array) -> int | None:
        """Take in an individual; return who leaves, perhaps the newcomer itself, or None if nobody does."""

    def parents(self, random: np.random.Generator) -> tuple[int, int]:
        """Draw two of those who live, who may be one and the same."""


class NicheArchive:
    """A fixed number of individuals; whoever has the least fitness leaves.

    Args:
        size: How many live at most.
        weights: Of the documents, (documents,).
        alpha: See `shared_fitness`.
        competition: `shared` fitness, or `none`: individuals are compared by their plain score.
        attraction: Whether the second parent is drawn by what it adds to the first, rather than by fitness.
    """

    def __init__(
        self,
        size: int,
        weights: Array,
        *,
        alpha: float = 1.0,
        competition: Literal["shared", "none"] = "shared",
        attraction: bool = True,
    ) -> None:
        self._size, self._weights = size, weights
        self._alpha, self._competition, self._attracted = alpha, competition, attraction
        self._numbers: list[int] = []
        self._rows = np.zeros((size + 1, len(weights)))
        self._binary = True
        self._worths: dict[float, Array] = {}
        self._fitness: Array | None = None

    @property
    def numbers(self) -> list[int]:
        """Who lives, in order of arrival."""
        return self._numbers

    @property
    def scores(self) -> Array:
        """Their scores, (individuals, documents)."""
        return self._rows[: len(self._numbers)]

    def fitness(self) -> Array:
        """Return the fitness of all who live."""
        if self._fitness is None:
            shared = self._competition == "shared"
            worths = self._worth_at(self._alpha) if shared else self._weights
            self._fitness = plain_fitness(self.scores, worths)
        return self._fitness

    def add(self, number: int, scores: Array) -> int | None:
        """Take in an individual; of the least fit the one who came first leaves."""
        self._rows[len(self._numbers)] = scores
        self._binary = self._binary and binary_only(scores)
        self._numbers.append(number)
        self._forget()
        if len(self._numbers) <= self._size:
            return None
        least = int(np.argmin(self.fitness()))
        self._forget()
        self._rows[least:-1] = self._rows[least + 1 :].copy()
        return self._numbers.pop(least)

    def parents(self, random: np.random.Generator) -> tuple[int, int]:
        """Draw one by fitness, and the other by attraction, else by fitness too."""
        first = draw(self.fitness(), random)
        if self._attracted:
            drawn_by = attraction(self.scores, self._worth_at(1.0), first, binary=self._binary)
            second = draw(drawn_by, random, other_than=first)
        else:
            second = draw(self.fitness(), random)
        return self._numbers[first], self._numbers[second]

    def _worth_at(self, alpha: float) -> Array:
        if alpha not in self._worths:
            self._worths[alpha] = worth(self.scores, self._weights, alpha, binary=self._binary)
        return self._worths[alpha]

    def _forget(self) -> None:
        self._fitness, self._worths = None, {}


class EliteGrid:
    """MAP-Elites: the best individual of each cell of a grid over the mean scores of groups of documents.

    The published code puts a mean score of 1 outside its grid and drops it; here it is in the last cell.

    Args:
        side: Cells along each axis.
        groups: One axis each: the documents whose mean score it is.
        weights: Of the documents, (documents,).
    """

    def __init__(self, side: int, groups: Sequence[Array], weights: Array) -> None:
        self._side, self._groups, self._weights = side, [np.asarray(g) for g in groups], weights
        self._cells: dict[tuple[int, ...], int] = {}
        self._numbers: list[int] = []
        self._known: dict[int, Array] = {}

    @property
    def numbers(self) -> list[int]:
        """Who lives, in order of arrival."""
        return self._numbers

    @property
    def scores(self) -> Array:
        """Their scores, (individuals, documents)."""
        return np.stack([self._known[n] for n in self._numbers]) if self._numbers else np.zeros((0, 0))

    def fitness(self) -> Array:
        """Return the plain scores of all who live."""
        return plain_fitness(self.scores, self._weights)

    def add(self, number: int, scores: Array) -> int | None:
        """Take in an individual if it is better than the one in its cell, who then leaves."""
        means = (float(scores[group].mean()) for group in self._groups)
        cell = tuple(min(int(self._side * mean), self._side - 1) for mean in means)
        held = self._cells.get(cell)
        if held is not None and self._quality(scores) <= self._quality(self._known[held]):
            return number
        self._cells[cell] = number
        self._known[number] = np.array(scores)
        self._numbers.append(number)
        if held is not None:
            self._numbers.remove(held)
            del self._known[held]
        return held

    def parents(self, random: np.random.Generator) -> tuple[int, int]:
        """Draw two in proportion to their scores."""
        fitness = self.fitness()
        return self._numbers[draw(fitness, random)], self._numbers[draw(fitness, random)]

    def _quality(self, scores: Array) -> float:
        return float((scores * self._weights).sum())


def draw(chances: Array, random: np.random.Generator, other_than: int | None = None) -> int:
    """Return an index drawn in proportion to the chances.

    Where all are 0 (nobody solves anything, or all behave alike) everyone has the same chance, but for
    `other_than`, unless there is nobody else.
    """
    total = float(chances.sum())
    if total <= 0.0:
        chances = np.ones(len(chances))
        if other_than is not None and len(chances) > 1:
            chances[other_than] = 0.0
        total = float(chances.sum())
    steps = np.cumsum(chances)
    found = int(np.searchsorted(steps, random.random() * steps[-1], side="right"))
    while found >= len(chances) or chances[found] <= 0.0:  # rounding at the end of the last step
        found -= 1
    return found
