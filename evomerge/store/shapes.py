"""What a run is read as: plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.records import Candidate, Outcome


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An optimizer's state at one point of a run.

    Attributes:
        asked: How many proposals the optimizer had made; the next one has this index.
        told: How many outcomes it had been told.
        state: Its state as JSON data.
    """

    asked: int
    told: int
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run.

    Attributes:
        id: Its number in the run, from 1 without gaps.
        at: When, in Unix seconds by the database's clock.
        kind: What kind of thing, one word.
        data: Details as JSON data.
    """

    id: int
    at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A recorded proposal: its candidate, and how many outcomes the optimizer had been told before it."""

    candidate: Candidate
    told_before: int


@dataclass(frozen=True, slots=True)
class Log:
    """What a resumed run replays.

    Attributes:
        asked: The optimizer's proposals in the order in which it made them.
        told: The outcomes it was told, in the order in which it was told them.
        waiting: Search outcomes of its proposals that it has not been told yet, by candidate number.
    """

    asked: tuple[Asked, ...]
    told: tuple[Outcome, ...]
    waiting: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How far a run has come.

    Attributes:
        candidates: How many it has.
        outcomes: Split -> status -> how many outcomes; only pairs that occur.
        best_candidate: The candidate with the best search score, the lowest number if several have it;
            None before the first.
        best_score: That score.
    """

    candidates: int
    outcomes: Mapping[str, Mapping[str, int]]
    best_candidate: int | None
    best_score: float | None
