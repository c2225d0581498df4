"""How far a run is, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """What a listener is shown after each outcome.

    Attributes:
        phase: `baselines`, `search`, `select` or `test`.
        done: Candidates finished in this phase, those of earlier sessions included.
        total: Candidates in this phase.
        best: Best search score of a searched candidate; None before the first.
        current: Score of the latest outcome; None if it failed.
        failures: Outcomes of the run without a score.
        workers: Workers that are up.
        deaths: Workers lost in this session.
    """

    phase: str
    done: int
    total: int
    best: float | None
    current: float | None
    failures: int
    workers: int
    deaths: int
