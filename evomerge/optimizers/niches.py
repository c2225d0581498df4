"""M2N2, natural niches: individuals compete for documents and mate with who can do what they cannot.

"Competition and Attraction Improve Model Fusion" (arXiv 2508.16204, GECCO 2025). The genetic algorithm, the
search without crossover and MAP-Elites are settings of the same code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from evomerge.errors import ConfigError, FitnessError
from evomerge.optimizers import base
from evomerge.optimizers.base import SteadyOptimizer
from evomerge.optimizers.niches_archive import Archive, EliteGrid, NicheArchive
from evomerge.optimizers.niches_coding import BoxCoding, Coding
from evomerge.optimizers.niches_crossover import Angle, cross, draw_cuts
from evomerge.optimizers.niches_evolution import Evolution
from evomerge.optimizers.niches_sharing import Array
from evomerge.optimizers.settings import NichesSettings
from evomerge.records import Genome, Proposal, Value
from evomerge.seeding import stream
from evomerge.spaces.cells import Table
from evomerge.spaces.dimensions import Dimension, check_genome

BOX_MUTATION = 0.05
"""Standard deviation of mutations of numbers, as a share of their range, unless the settings say another."""


class Niches(SteadyOptimizer):
    """Breeds one child at a time from an archive in which individuals share what each document is worth.

    The first proposals are the founders: the start genome, the sources, the individuals of an imported
    population. Until `warm_up` candidates were proposed, the next are random merges of founders, or uniform
    draws where there are none. After that each is a child of two who live. An outcome counts when it comes:
    any number of proposals may be outstanding, and none ever waits for another.

    In a space of segments individuals are segment tables, and founders the sources. In any other space they
    are the numbers of the genome, mixed along straight lines and mutated.

    Attributes:
        parents: Proposal to those it is a child of; none of a founder.
    """

    rank_based = False
    ordered_replay = True
    rounding = 1e-9
    climbs = False  # equal scores may come from other documents, and then there is something to combine

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        seed: int,
        settings: NichesSettings | None = None,
        start: Genome | None = None,
        *,
        coding: Coding | None = None,
        founders: Sequence[Genome] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Set up an empty archive.

        Args:
            dimensions: What to vary.
            seed: Root of the random streams.
            settings: Defaults if None.
            start: The first proposal; None: none of its own.
            coding: Of genomes as tables; None: they are the numbers of the dimensions.
            founders: Proposed after the coding's own.
            weights: Of the tasks, by name; None: all alike.

        Raises:
            ConfigError: No dimension has more than one value, or a setting does not fit the space.
            ValueError: `start` or a founder is no genome of this space.
        """
        super().__init__(dimensions, seed, None)
        self.settings = settings or NichesSettings()
        self._box = BoxCoding(self.dimensions, seed) if coding is None else None
        self._coding: Coding = coding or self._box  # type: ignore[assignment]
        self._check_settings()
        self._founders = [*([] if start is None else [start]), *self._coding.origins, *founders]
        for genome in self._founders:
            if self._box is not None:
                check_genome(self.dimensions, genome)
            self._coding.table(genome)
        self._weights = weights
        self._counts: dict[str, int] = {}
        self._evolution: Evolution | None = None
        self._waiting: dict[int, Table] = {}
        self._alike = False
        self._first: Array | None = None
        self._differ = False
        self.parents: dict[int, tuple[int, ...]] = {}

    @property
    def archive(self) -> Archive | None:
        """Who lives; None before the first outcome."""
        return None if self._evolution is None else self._evolution.archive

    def tell(
        self, index: int, score: float | None, values: Mapping[str, Sequence[Value]] | None = None
    ) -> None:
        """Take the score of a proposal, and its score on every document.

        Args:
            index: The proposal's index.
            score: None: invalid or failed; it does not enter the archive.
            values: Task to one number in [0, 1] per document, higher is better, the same documents each time.

        Raises:
            FitnessError: There are no such values, they are out of range, or of other documents.
            ValueError: See the base class.
        """
        row = None if score is None else self._row(index, values or {})
        super().tell(index, score)
        table = self._waiting.pop(index)
        if row is not None:
            self._admit(index, table, row)
            self._end_if_alike(row)

    def adopt(self, proposal: Proposal) -> None:
        """Take over, on resume, the next proposal of the original run."""
        super().adopt(proposal)
        self._waiting[proposal.index] = self._coding.table(proposal.genome)

    def _nearly(self, asked: Proposal, recorded: Proposal) -> bool:
        if self._box is not None:
            return super()._nearly(asked, recorded)
        same = (asked.index, asked.generation) == (recorded.index, recorded.generation)
        return (
            same
            and len(asked.genome) == len(recorded.genome)
            and np.allclose(asked.genome, recorded.genome, rtol=0.0, atol=self.rounding)
        )

    def _draw(self, index: int) -> tuple[int, Genome]:
        table, self.parents[index] = self._next(index)
        genome = self._founders[index] if index < len(self._founders) else self._coding.genome(table)
        self._waiting[index] = self._coding.table(genome)
        return index, tuple(map(float, genome))

    def _next(self, index: int) -> tuple[Table, tuple[int, ...]]:
        """Return the table of a proposal, and whose child it is."""
        if index < len(self._founders):
            return self._coding.table(self._founders[index]), ()
        random = stream(self.seed, "niches", index)
        evolution = self._evolution
        warm_up = self.settings.size if self.settings.warm_up is None else self.settings.warm_up
        if index >= warm_up and evolution is not None and evolution.archive.numbers:
            child, parents = evolution.breed(random)
            if self._box is not None:
                tables = [evolution.tables[number] for number in parents]
                child = self._box.settled(child, tables, index, self._mutation)
            return child, parents
        if self._box is not None:
            return self._box.table(self._box.drawn(index)), ()
        return self._merge_of_founders(random)

    def _merge_of_founders(self, random: np.random.Generator) -> tuple[Table, tuple[int, ...]]:
        first, second = random.choice(len(self._founders), 2, replace=False).tolist()
        tables = [self._coding.table(self._founders[i]) for i in (first, second)]
        cuts = draw_cuts(self._coding.cells, random, split_point=self.settings.split_point)
        child = cross(tables[0], tables[1], self._coding.cells, cuts, self._angle)
        return child, (first, second)

    def _admit(self, index: int, table: Table, row: Array) -> None:
        if self._evolution is None:
            self._evolution = Evolution(
                self._coding.cells,
                self._new_archive(),
                crossover=self.settings.crossover,
                split_point=self.settings.split_point,
                angle=self._angle,
                mutation=self._mutation,
            )
        self._evolution.add(index, table, row)
        self._note_if_alike(index, self._evolution.archive.scores)

    def _end_if_alike(self, row: Array) -> None:
        """Finish when many answered and none otherwise than the first: there is nothing to combine."""
        self._first = row if self._first is None else self._first
        self._differ = self._differ or bool((row != self._first).any())
        if not self._differ and self._scored >= base.FLAT:
            self.finished = f"all {self._scored} candidates so far answer alike: there is nothing to climb"

    def _note_if_alike(self, index: int, scores: Array) -> None:
        alike = len(scores) >= self.settings.size and bool((scores == scores[0]).all())
        if alike and not self._alike:
            self._notes.append(
                f"after candidate {index} all {len(scores)} of the archive answer alike: parents drawn evenly"
            )
        self._alike = alike

    def _new_archive(self) -> Archive:
        settings, weights = self.settings, self._document_weights()
        if settings.archive == "niches":
            return NicheArchive(
                settings.size,
                weights,
                alpha=settings.alpha,
                competition=settings.competition,
                attraction=settings.attraction,
            )
        ends = np.cumsum([0, *self._counts.values()])
        groups = [np.arange(start, stop) for start, stop in pairwise(ends)]
        if len(groups) == 1:
            groups = [groups[0][::2], groups[0][1::2]]
        return EliteGrid(settings.grid, groups, weights)

    def _document_weights(self) -> Array:
        """Return a weight for each document, which add up to 1."""
        parts = []
        for task, count in self._counts.items():
            weight = 1.0 if self._weights is None else self._weights[task]
            by_task = self.settings.documents == "by_task"
            parts.append(np.full(count, weight / count if by_task else 1.0))
        weights = np.concatenate(parts)
        return np.asarray(weights / weights.sum())

    def _row(self, index: int, values: Mapping[str, Sequence[Value]]) -> Array:
        """Return the scores on all documents, task by task."""
        counts = {task: len(values[task]) for task in sorted(values)}
        if sum(counts.values()) < 2:
            raise FitnessError(
                "optimizer niches needs the score of every document, the fitness gives one number; "
                "return a list with one number per document"
            )
        if self._counts and counts != self._counts:
            raise FitnessError(
                f"optimizer niches needs the same documents for all: candidate {index} has values of "
                f"{sum(counts.values())} documents, those before of {sum(self._counts.values())}"
            )
        row = np.zeros(sum(counts.values()))
        place = 0
        for task in counts:
            for document, value in enumerate(values[task]):
                if isinstance(value, tuple) or not 0.0 <= value <= 1.0:
                    raise FitnessError(
                        f"optimizer niches needs scores from 0 to 1: task {task} has {value} for document "
                        f"{document} of candidate {index}"
                    )
                row[place] = value
                place += 1
        self._counts = counts
        return row

    @property
    def _mutation(self) -> float:
        given = self.settings.mutation
        return given if given is not None else BOX_MUTATION if self._box is not None else 0.0

    @property
    def _angle(self) -> Angle:
        if self._box is not None:
            return "none"
        return self.settings.slerp_angle or "global"

    def _check_settings(self) -> None:
        settings = self.settings
        if self._box is None and settings.mutation:
            raise ConfigError(
                "optimizer.mutation: segments are only mixed, never mutated (mutation is for searches from "
                f"scratch); expected 0, got {settings.mutation:g}"
            )
        if self._box is not None and settings.slerp_angle is not None:
            raise ConfigError(
                "optimizer.slerp_angle: has an effect only in a space of segments, not on other numbers"
            )
        if not settings.crossover and math.isclose(self._mutation, 0.0):
            raise ConfigError("optimizer.crossover: without it and without mutation every child is a copy")
