"""The ask/tell contract of every optimizer.

An optimizer proposes genomes (`ask`) and is told their scores (`tell`); higher is better. It holds no random
generator: every draw comes from a stream named by what it is for, so equal seed, dimensions, settings and
tells give equal proposals bit for bit, on one machine or after a resume.

Resuming: `restore` the newest state if there is one; then `adopt` the proposals with an index of at least
`asked` in order, and `tell` the outcomes of the adopted ones: those of earlier generations before a proposal
is adopted, the rest at the end. Only optimizers with `ordered_replay` need the original order of both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError, UserError
from evomerge.records import Genome, Proposal, Value
from evomerge.spaces.dimensions import Dimension, check_genome

HOPELESS = 50
"""A steady-state optimizer stops once this many outcomes came back and none of them has a score."""


FLAT = 200
"""A steady-state optimizer stops once this many outcomes have scores and no two of them differ."""

STALE = 200
"""A steady-state optimizer says so when this many outcomes in a row brought no better score."""


class StateError(UserError):
    """A snapshot or a recorded proposal is not what this optimizer would have made."""


class Optimizer(ABC):
    """Proposes genomes and learns from their scores.

    Attributes:
        generational: True: outcomes are buffered until the generation is whole and then applied in the order
            of their indices, so their order of arrival changes nothing. False: each outcome counts at once,
            and any number of proposals may be outstanding.
        rank_based: True: only the order of the scores matters, not their values.
        ordered_replay: True: on resume `adopt` and `tell` must be called in the order in which the original
            run asked and told. False: the adoptions of a generation may come first, then its outcomes in any
            order; without generations, all of both.
        rounding: How far a real number of an adopted genome may be from the one drawn again. Above 0 where
            draws go through BLAS, whose last bits differ between processors and thread counts.
        dimensions: What it varies, at least one of them free.
        seed: The root of its random streams.
        finished: Why it stopped by itself; empty while it goes on.
    """

    generational: bool = False
    rank_based: bool = True
    ordered_replay: bool = False
    rounding: float = 0.0

    def __init__(self, dimensions: Sequence[Dimension], seed: int, start: Genome | None = None) -> None:
        """Check what every optimizer takes.

        Args:
            dimensions: What to vary.
            seed: Root seed; any integer.
            start: A genome to begin from; None leaves the beginning to the optimizer.

        Raises:
            ConfigError: No dimension has more than one value.
            ValueError: `start` is no genome of these dimensions.
        """
        self.dimensions = tuple(dimensions)
        if not any(dimension.free for dimension in self.dimensions):
            raise ConfigError("space: there is nothing to search, no dimension has more than one value")
        if start is not None:
            check_genome(self.dimensions, start)
        self.seed = seed
        self.finished = ""
        self._asked = 0
        self._outstanding: set[int] = set()
        self._notes: list[str] = []

    @property
    def asked(self) -> int:
        """How many proposals were asked or adopted so far: the index of the next one."""
        return self._asked

    def ask(self) -> Proposal | None:
        """Return the next proposal, or None if outcomes are needed first or the optimizer has finished."""
        drawn = None if self.finished else self._draw(self._asked)
        if drawn is None:
            return None
        generation, genome = drawn
        return self._hand_out(Proposal(self._asked, generation, genome))

    def tell(
        self, index: int, score: float | None, values: Mapping[str, Sequence[Value]] | None = None
    ) -> None:
        """Take the score of a proposal.

        Args:
            index: The proposal's index.
            score: Higher is better; None: invalid or failed, which ranks worst. Ties go to the lower index.
            values: Task to one value per document; only some optimizers look at them.

        Raises:
            ValueError: The score is not finite, or the index was never asked or was told before.
        """
        del values
        if score is not None and not math.isfinite(score):
            raise ValueError(f"proposal {index}: the score {score} is not finite; tell None for a failure")
        if index not in self._outstanding:
            known = 0 <= index < self._asked
            raise ValueError(f"proposal {index} was {'told before' if known else 'never asked'}")
        self._outstanding.remove(index)
        self._take(index, None if score is None else float(score))

    def adopt(self, proposal: Proposal) -> None:
        """Take over, on resume, the next proposal of the original run.

        Raises:
            StateError: This optimizer would propose something else, by more than `rounding`.
        """
        asked = self.ask()
        if asked == proposal:
            return
        if asked is None or not self._nearly(asked, proposal):
            raise StateError(
                f"proposal {proposal.index} cannot be continued: the run recorded {_short(proposal)}, this "
                f"optimizer proposes {_short(asked)}; another seed, setting, library version or processor "
                "gives other draws"
            )
        note = "continued where numbers round differently than before: from here on not the same bit for bit"
        if note not in self._notes:
            self._notes.append(note)

    def recommendation(self) -> list[Genome]:
        """Return genomes that were not asked but belong to the finalists, best first; often none."""
        return []

    def drain_notes(self) -> list[str]:
        """Return what happened since the last call that people should read (restarts), and forget it."""
        notes, self._notes = self._notes, []
        return notes

    @abstractmethod
    def state(self) -> dict[str, Any] | None:
        """Return a snapshot as JSON data.

        None: there is no small snapshot at this point (in the middle of a generation), or never one (the
        optimizer is rebuilt from all its proposals and outcomes).
        """

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot that `state` of an equally configured optimizer returned.

        Raises:
            StateError: The snapshot is damaged or belongs to another configuration.
        """

    @abstractmethod
    def _draw(self, index: int) -> tuple[int, Genome] | None:
        """Return the generation and genome of the proposal with that index; None: outcomes are needed."""

    @abstractmethod
    def _take(self, index: int, score: float | None) -> None:
        """Take a checked score."""

    def _nearly(self, asked: Proposal, recorded: Proposal) -> bool:
        """Return whether the proposals differ by rounding only."""
        if (asked.index, asked.generation) != (recorded.index, recorded.generation):
            return False
        return len(asked.genome) == len(recorded.genome) and all(
            abs(one - two) <= (self.rounding if dimension.kind == "real" else 0.0)
            for dimension, one, two in zip(self.dimensions, asked.genome, recorded.genome, strict=True)
        )

    def _hand_out(self, proposal: Proposal) -> Proposal:
        self._outstanding.add(proposal.index)
        self._asked += 1
        return proposal


class SteadyOptimizer(Optimizer):
    """An optimizer without generations; without snapshots too it is rebuilt from all that was asked and told.

    It finishes when the first `HOPELESS` outcomes are all failures, or when the first `FLAT` scores are
    equal, and leaves a note when `STALE` outcomes in a row brought nothing better.

    Attributes:
        climbs: Whether equal scores mean that there is nothing to find.
    """

    climbs: bool = True

    def __init__(self, dimensions: Sequence[Dimension], seed: int, start: Genome | None = None) -> None:
        super().__init__(dimensions, seed, start)
        self._scored = 0
        self._failed = 0
        self._best: float | None = None
        self._equal = True
        self._stale = 0

    def state(self) -> dict[str, Any] | None:
        """Return None: it is rebuilt from its proposals and outcomes."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Raise StateError: there is no snapshot of such an optimizer."""
        raise StateError(f"{type(self).__name__} is rebuilt from its history, it has no snapshots")

    def _take(self, index: int, score: float | None) -> None:
        self._scored += score is not None
        self._failed += score is None
        self._count(score)
        self.finished = ""
        if self._scored == 0 and self._failed >= HOPELESS:
            self.finished = f"all of the first {self._failed} candidates failed"
        elif self.climbs and self._equal and self._scored >= FLAT:
            self.finished = f"every score so far is {self._best:g}: there is nothing to climb"

    def _count(self, score: float | None) -> None:
        before = self._best
        if score is not None:
            self._equal = self._equal and before in (None, score)
            self._best = score if before is None else max(before, score)
        self._stale = 0 if self._best != before else self._stale + 1
        if self._stale == STALE and before is not None:
            self._notes.append(f"no better candidate than {before:g} in the last {STALE} outcomes")


def _short(proposal: Proposal | None) -> str:
    """Return the beginning of a proposal for a message."""
    if proposal is None:
        return "none"
    genome = ", ".join(f"{value:.17g}" for value in proposal.genome[:3])
    more = ", ..." if len(proposal.genome) > 3 else ""
    return f"({genome}{more}) in generation {proposal.generation}"
