"""What every tracker does, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.records import Candidate, Outcome


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        key: 16 hex digits, unlike those of any other run.
        name: Its name.
        config: Its config as plain data.
        facts: What was frozen at its start.
    """

    key: str
    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """An outcome and where in the run it came.

    Attributes:
        step: Its place among the run's outcomes, from 1.
        at: When it was recorded, in Unix seconds; None: unknown.
        candidate: The candidate.
        outcome: Its outcome, without values by document.
        best: The best search score of a searched candidate so far; None before the first.
        failures: Outcomes without a score so far.
    """

    step: int
    at: float | None
    candidate: Candidate
    outcome: Outcome
    best: float | None
    failures: int

    @property
    def phase(self) -> str:
        """`baselines`, `search`, `select` or `test`."""
        split = self.outcome.documents.partition("@")[0]
        searched = self.candidate.origin in ("optimizer", "mean")
        return split if split != "search" or searched else "baselines"

    @property
    def metrics(self) -> dict[str, float]:
        """Everything about it that is a number, by name; the same names in every tracker."""
        outcome, phase = self.outcome, self.phase
        found = {"outcomes": float(self.step), "failures": float(self.failures)}
        if outcome.score is not None:
            found[f"{phase}/score"] = outcome.score
        if phase == "search" and self.best is not None:
            found["search/best"] = self.best
        for name, task in outcome.tasks.items():
            found[f"{phase}/{name}"] = task.metric
        for name in ("merge", "evaluate"):
            if name in outcome.cost:
                found[f"seconds/{name}"] = outcome.cost[name]
        return found


@dataclass(frozen=True, slots=True)
class Ending:
    """How a session of a run ended.

    Attributes:
        status: `finished`, `stopped` or `failed`.
        error: Why it failed; empty otherwise.
        verdict: One sentence: whether the winner beats the best baseline.
        winner: The winner's number; None while none is chosen.
        scores: Document set to the winner's score.
    """

    status: str
    error: str = ""
    verdict: str = ""
    winner: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class Tracker(ABC):
    """Shows one run elsewhere.

    Every method may be called again with what it was told before: the same run resumed, or tracked once
    more. What is there already stays as it is, once. All calls come from one thread.
    """

    @abstractmethod
    def started(self, run: TrackedRun) -> int:
        """Make the run's place, or find it again; return the step of the last outcome that it has, 0: none.

        Raises:
            UserError: It cannot be made, or is another run's.
        """

    @abstractmethod
    def record(self, candidates: Sequence[Candidate], scored: Sequence[Scored]) -> None:
        """Take in what is new.

        Args:
            candidates: In the order of their numbers; the first call of a session has all of them again.
            scored: In the order of their steps, those above what `started` returned.
        """

    @abstractmethod
    def finished(self, ending: Ending) -> None:
        """Say how the session ended; it may go on later."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. May be called twice."""
