"""How far a run is and what its workers do, for whoever shows it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.records import Outcome
    from evomerge.store import Run
    from evomerge.workers.pool import Pool

ACTIVITY_SECONDS = 1.0
"""Least time between two records of what the workers do."""


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


class Activity:
    """Records in the store what the workers of one driver session do, now and then.

    Args:
        run: The driver's handle.
        pool: The workers.
    """

    def __init__(self, run: Run, pool: Pool) -> None:
        self._run, self._pool = run, pool
        self._began, self._said = time.monotonic(), 0.0
        self._busy = 0.0

    def took(self, outcome: Outcome) -> None:
        """Count the worker's seconds that an outcome took."""
        self._busy += outcome.cost.get("total", 0.0)

    def say(self, phase: str, done: int, total: int) -> None:
        """Record it, unless that was done just now; `phase`, `done` and `total` as in `Progress`."""
        now = time.monotonic()
        if now - self._said < ACTIVITY_SECONDS:
            return
        self._said = now
        state = self._pool.state()
        offered = (now - self._began) * max(1, state.workers)
        self._run.set_activity(
            {
                "phase": phase,
                "done": done,
                "total": total,
                "deaths": state.deaths,
                "busy_share": min(1.0, self._busy / offered) if offered > 0 else 0.0,
                "workers": [asdict(worker) for worker in self._pool.workers_now()],
            }
        )
