"""M2N2, natural niches: individuals compete for documents and mate with who can do what they cannot.

"Competition and Attraction Improve Model Fusion" (arXiv 2508.16204, GECCO 2025). The genetic algorithm, the
search without crossover and MAP-Elites are settings of the same code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from evomerge.errors import ConfigError, FitnessError
from evomerge.optimizers import base
from evomerge.optimizers.base import StateError, SteadyOptimizer
from evomerge.optimizers.niches_archive import Archive, EliteGrid, NicheArchive
from evomerge.optimizers.niches_coding import BoxCoding, Coding
from evomerge.optimizers.niches_crossover import Angle, cross, draw_cuts
from evomerge.optimizers.niches_evolution import Evolution
from evomerge.optimizers.niches_sharing import Array, binary_only
from evomerge.optimizers.packing import pack, unpack
from evomerge.optimizers.settings import NichesSettings
from evomerge.records import Genome, Proposal, Value
from evomerge.seeding import stream
from evomerge.spaces.cells import Table
from evomerge.spaces.dimensions import Dimension, check_genome

BOX_MUTATION = 0.05
"""Standard deviation of mutations of numbers, as a share of their range, unless the settings say another."""

SNAPSHOT_EVERY = 20
"""Outcomes from one snapshot to the next; a resume repeats at most so many, or as many as were under way."""

_COUNTERS = ("_scored", "_failed", "_best", "_equal", "_stale", "_alike", "_differ", "_counts", "finished")


class Niches(SteadyOptimizer):
    """Breeds one child at a time from an archive in which individuals share what each document is worth.

    The first proposals are the founders: the start genome, the sources, the individuals of an imported
    population. Until `warm_up` candidates were proposed, the next are random merges of founders, or uniform
    draws where there are none. After that each is a child of two who live. An outcome counts when it comes:
    any number of proposals may be outstanding, and none ever waits for another.

    In a space of segments individuals are segment tables, and founders the sources. In any other space they
    are the numbers of the genome, mixed along straight lines and mutated.

    Attributes:
        parents: Proposal to those it is a child of, none of a founder; of what was asked since the snapshot
            that this optimizer was restored from.
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
        self._genomes: dict[int, Genome] = {}  # of those who live, and of those who have no score yet
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
        if row is None:
            del self._genomes[index]
        else:
            self._admit(index, row)
            self._note_if_alike(index)
            self._end_if_alike(row)

    def adopt(self, proposal: Proposal) -> None:
        """Take over, on resume, the next proposal of the original run."""
        super().adopt(proposal)
        self._genomes[proposal.index] = proposal.genome

    def state(self) -> dict[str, Any] | None:
        """Return a snapshot, with the whole population, after every `SNAPSHOT_EVERY` outcomes.

        Where more proposals than that are outstanding, which it holds too, it is after as many outcomes.
        """
        steps = max(1, math.ceil(len(self._outstanding) / SNAPSHOT_EVERY))
        if (self._scored + self._failed) % (steps * SNAPSHOT_EVERY):
            return None
        archive = self.archive
        scores = None if archive is None else archive.scores
        if scores is not None and binary_only(scores):
            scores = scores.astype(np.uint8)
        return {
            "kind": self._kind(),
            "asked": self._asked,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "living": [] if archive is None else [[n, *self._genomes[n]] for n in archive.numbers],
            "waiting": [[n, *self._genomes[n]] for n in sorted(self._outstanding)],
            "rows": pack({"scores": scores, "first": None if self._differ else self._first}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot."""
        try:
            if state["kind"] != self._kind():
                raise ValueError(f"made by {state['kind']}, this is {self._kind()}")
            counters = {name: state["counters"][name] for name in _COUNTERS}
            living, waiting = (
                {int(number): tuple(map(float, genome)) for number, *genome in state[part]}
                for part in ("living", "waiting")
            )
            tables = [self._coding.table(genome) for genome in living.values()]
            rows, asked = unpack(state["rows"]), int(state["asked"])
            scores = [] if rows["scores"] is None else list(rows["scores"].astype(np.float64))
            members = list(zip(living, tables, scores, strict=True))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the snapshot cannot be used: {error}") from error
        for name, value in counters.items():
            setattr(self, name, value)
        self._asked, self._outstanding, self._genomes = asked, set(waiting), living | waiting
        self._first = rows["first"]
        self._evolution = None
        for number, table, row in members:
            self._living.add(number, table, row)

    def _kind(self) -> list[Any]:
        """What a snapshot must agree on to be used."""
        sizes = [[dimension.kind, dimension.size] for dimension in self.dimensions]
        return ["niches", self.seed, asdict(self.settings), len(self._founders), sizes]

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
        self._genomes[index] = tuple(map(float, genome))
        return index, self._genomes[index]

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

    @property
    def _living(self) -> Evolution:
        """The evolution; it begins with the first score, which tells what documents there are."""
        if self._evolution is None:
            self._evolution = Evolution(
                self._coding.cells,
                self._new_archive(),
                crossover=self.settings.crossover,
                split_point=self.settings.split_point,
                angle=self._angle,
                mutation=self._mutation,
            )
        return self._evolution

    def _admit(self, index: int, row: Array) -> None:
        left = self._living.add(index, self._coding.table(self._genomes[index]), row)
        if left is not None:
            del self._genomes[left]

    def _end_if_alike(self, row: Array) -> None:
        """Finish when many answered and none otherwise than the first: there is nothing to combine."""
        self._first = row if self._first is None else self._first
        self._differ = self._differ or bool((row != self._first).any())
        if not self._differ and self._scored >= base.FLAT:
            self.finished = f"all {self._scored} candidates so far answer alike: there is nothing to climb"

    def _note_if_alike(self, index: int) -> None:
        scores = self._living.archive.scores
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
