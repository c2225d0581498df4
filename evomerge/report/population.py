"""The population of a run: who lives, where they come from, and how coverage and entropy went.

Nothing of it is stored: which parents are drawn and who leaves depends on scores alone, so that the optimizer
is asked and told again as the store has recorded it, over a space without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from evomerge.errors import ConflictError
from evomerge.optimizers import create
from evomerge.optimizers.niches import Niches
from evomerge.optimizers.niches_sharing import Array, coverage, entropy
from evomerge.population import Member, PopulationFile
from evomerge.recipe import SourceRef
from evomerge.records import Candidate, Genome, Outcome
from evomerge.spaces.cells import Cells, Table
from evomerge.spaces.dimensions import Dimension
from evomerge.store import RunView

SOLVED = 0.5
"""A document counts as solved from this score on."""


class _Weightless:
    """A coding whose genomes say nothing; enough to draw parents."""

    def __init__(self, count: int) -> None:
        self.cells = Cells.vector(1)
        self.origins: Sequence[Genome] = [(0.0,)] * count

    def table(self, genome: Genome) -> Table:
        del genome
        return np.zeros((1, 1))

    def genome(self, table: Table) -> Genome:
        del table
        return (0.0,)


@dataclass(frozen=True, slots=True)
class Individual:
    """One who lives.

    Attributes:
        candidate: The candidate.
        score: Its search score.
        share: Its part of the fitness of all.
        alone: Documents that it alone solves.
        niche: Task to the part of its fitness that it has from there.
        parents: Numbers of its parents; none of a founder.
        depth: Generations from the founders.
        segments: How many it has; None in other spaces.
        ancestry: Source to its mean coefficient over all entries; empty in other spaces.
    """

    candidate: Candidate
    score: float
    share: float
    alone: int
    niche: Mapping[str, float]
    parents: tuple[int, ...]
    depth: int
    segments: int | None
    ancestry: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "candidate": self.candidate.number,
            "score": self.score,
            "fitness_share": self.share,
            "documents_alone": self.alone,
            "niche": dict(self.niche),
            "parents": list(self.parents),
            "depth": self.depth,
            "segments": self.segments,
            "ancestry": dict(self.ancestry),
            "digest": self.candidate.digest,
        }


class Population:
    """The archive of a run of the optimizer niches, as it is after the last outcome it was told.

    Args:
        run: The run.

    Attributes:
        curve: After each outcome: how many were told, coverage, entropy in bits, best score that lives.
        parents: Number of every proposed candidate to those of its parents.

    Raises:
        ConflictError: The run has another optimizer, or nothing was scored yet.
    """

    def __init__(self, run: RunView) -> None:
        if (run.config.get("optimizer") or {}).get("name") != "niches":
            raise ConflictError(f'run "{run.name}": only runs of the optimizer niches have a population')
        self.run = run
        log = run.log()
        self._candidates = {asked.candidate.index or 0: asked.candidate for asked in log.asked}
        self._optimizer = _fresh(run)
        self.curve: list[tuple[int, float, float, float]] = []
        self._scores: dict[int, float] = {}
        self._tasks: dict[str, int] = {}
        told = list(log.told)
        index_of = {candidate.number: index for index, candidate in self._candidates.items()}
        count = 0
        for asked in log.asked:
            while count < min(asked.told_before, len(told)):
                self._tell(index_of, told[count])
                count += 1
            self._optimizer.ask()
        for outcome in told[count:]:
            self._tell(index_of, outcome)
        if self._optimizer.archive is None:
            raise ConflictError(f'run "{run.name}": nothing has been scored yet, so nobody lives')
        number = {index: candidate.number for index, candidate in self._candidates.items()}
        self.parents = {
            number[index]: tuple(number[parent] for parent in parents)
            for index, parents in self._optimizer.parents.items()
            if index in number
        }

    @property
    def living(self) -> list[Individual]:
        """Who lives, the fittest first."""
        archive = self._optimizer.archive
        if archive is None:
            return []
        scores, fitness = archive.scores, archive.fitness()
        shares = fitness / (fitness.sum() or 1.0)
        solvers = (scores >= SOLVED).sum(axis=0)
        found = []
        for place, index in enumerate(archive.numbers):
            candidate = self._candidates[index]
            alone = int(((scores[place] >= SOLVED) & (solvers == 1)).sum())
            found.append(
                Individual(
                    candidate,
                    self._scores[index],
                    float(shares[place]),
                    alone,
                    self._niche(scores, place),
                    self.parents[candidate.number],
                    self.depths[candidate.number],
                    *self._segments(candidate),
                )
            )
        return sorted(found, key=lambda one: (-one.share, one.candidate.number))

    def complementary(self, count: int) -> list[Individual]:
        """Return those who together solve most: each adds most to the ones before it."""
        archive = self._optimizer.archive
        if archive is None:
            return []
        best = np.zeros(archive.scores.shape[1])
        chosen: list[Individual] = []
        left = dict(enumerate(archive.numbers))
        by_index = {one.candidate.index: one for one in self.living}
        while left and len(chosen) < count:
            place = max(left, key=lambda i: (float(np.maximum(best, archive.scores[i]).sum()), -i))
            best = np.maximum(best, archive.scores[place])
            chosen.append(by_index[left.pop(place)])
        return chosen

    @cached_property
    def depths(self) -> dict[int, int]:
        """Number of every proposed candidate to its generations from the founders."""
        known: dict[int, int] = {}
        for child in sorted(self.parents):
            parents = self.parents[child]
            known[child] = 1 + max(known[parent] for parent in parents) if parents else 0
        return known

    def lineage(self, number: int) -> dict[int, tuple[int, ...]]:
        """Return a candidate and all its ancestors, with their parents."""
        found: dict[int, tuple[int, ...]] = {}
        left = [number]
        while left:
            child = left.pop()
            if child not in found:
                found[child] = self.parents[child]
                left += found[child]
        return dict(sorted(found.items()))

    def to_file(self) -> PopulationFile:
        """Return those who live as a population file."""
        facts = self.run.facts
        names = [ref["name"] for ref in self.run.config["sources"]["models"]]
        members = [
            Member(
                candidate=one.candidate.number,
                score=one.score,
                parents=one.parents,
                genome=one.candidate.genome or (),
            )
            for one in self.living
        ]
        chromosomes = facts.get("chromosomes")
        return PopulationFile(
            kind="segments" if chromosomes else "numbers",
            run=self.run.name,
            sources=tuple(SourceRef(**facts["sources"][name]) for name in names),
            chromosomes=tuple(tuple(c["roles"]) for c in chromosomes or ()),
            entries=tuple(c["entries"] for c in chromosomes or ()),
            dimensions=() if chromosomes else tuple(tuple(d) for d in facts["space"]),
            individuals=tuple(members),
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything `population --json` prints."""
        archive = self._optimizer.archive
        scores: Array = np.zeros((0, 0)) if archive is None else archive.scores
        return {
            "run": self.run.name,
            "documents": scores.shape[1],
            "coverage": coverage(scores),
            "entropy": entropy(scores),
            "individuals": [one.to_json() for one in self.living],
            "curve": [
                {"told": told, "coverage": covered, "entropy": bits, "best": best}
                for told, covered, bits, best in self.curve
            ],
        }

    def _tell(self, index_of: Mapping[int, int], outcome: Outcome) -> None:
        index = index_of[outcome.candidate]
        self._optimizer.tell(index, outcome.score, outcome.values)
        if outcome.score is not None:
            self._scores[index] = outcome.score
            self._tasks = {task: len(outcome.values[task]) for task in sorted(outcome.values)}
        archive = self._optimizer.archive
        if archive is not None:
            best = max(self._scores[number] for number in archive.numbers)
            self.curve.append((len(self.curve) + 1, coverage(archive.scores), entropy(archive.scores), best))

    def _niche(self, scores: Array, place: int) -> dict[str, float]:
        """Return the part of an individual's shared documents that each task has."""
        total = scores.sum(axis=0)
        parts = np.where(total > 0.0, scores[place] / np.where(total > 0.0, total, 1.0), 0.0)
        found, start = {}, 0
        for task, count in self._tasks.items():
            found[task] = float(parts[start : start + count].sum())
            start += count
        whole = sum(found.values()) or 1.0
        return {task: part / whole for task, part in found.items()}

    def _segments(self, candidate: Candidate) -> tuple[int | None, dict[str, float]]:
        chromosomes = self.run.facts.get("chromosomes")
        if not chromosomes or candidate.genome is None:
            return None, {}
        names = [ref["name"] for ref in self.run.config["sources"]["models"]]
        rows = np.array(candidate.genome).reshape(-1, 1 + len(names))
        total = sum(chromosome["entries"] for chromosome in chromosomes)
        lengths = np.diff([*rows[:, 0], total]) / total
        means = (lengths[:, None] * rows[:, 1:]).sum(axis=0)
        return len(rows), dict(zip(names, means.tolist(), strict=True))


def _fresh(run: RunView) -> Niches:
    """Return the run's optimizer at its beginning, over a space without weights."""
    facts = run.facts
    given = {k: v for k, v in run.config["optimizer"].items() if k not in ("name", "start")}
    dimensions = [Dimension(*dimension) for dimension in facts["space"]]
    starts = [c for c in run.candidates() if c.origin.startswith("start:") and c.genome is not None]
    scored = [
        (o.score, -c.number, c)
        for c in starts
        if (o := run.outcome(c.number, "search")) and o.score is not None
    ]
    start = max(scored, key=lambda one: one[:2])[2].genome if scored else None
    weights = {name: rule["weight"] for name, rule in facts["rules"].items()} or None
    more: dict[str, Any] = {"weights": weights}
    if facts.get("chromosomes"):
        more["coding"] = _Weightless(len(run.config["sources"]["models"]))
    founders = [tuple(genome) for genome in facts.get("founders", [])]
    found = create("niches", dimensions, int(run.config["seed"]), given, start, founders=founders, **more)
    if not isinstance(found, Niches):
        raise TypeError(found)
    return found
