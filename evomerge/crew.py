"""What a driver sees of its workers and evaluator: losses, that it waits for workers, that all fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from evomerge.errors import FitnessError
from evomerge.records import Outcome
from evomerge.store import Run
from evomerge.workers.pool import Pool

ALONE_SECONDS = 15.0
"""How long a run may be without workers before it says so."""

BROKEN_AFTER = 5
"""Failures without a single success after which the evaluator counts as broken."""

BROKEN_IN_A_ROW = 50
"""Failures in a row after which it does so in spite of earlier successes."""


class Health:
    """Counts what could not be scored.

    Args:
        known: The run's outcomes so far.

    Attributes:
        failures: Outcomes of the run without a score.
    """

    def __init__(self, known: Iterable[Outcome]) -> None:
        self._ok = self.failures = self._in_a_row = 0
        self._first: Outcome | None = None
        for outcome in known:
            self.add(outcome)
        self._in_a_row = 0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self._ok += outcome.score is not None
        self.failures += outcome.score is None
        self._in_a_row = self._in_a_row + 1 if outcome.status == "failed" else 0
        if outcome.status == "failed" and self._first is None:
            self._first = outcome

    def check(self) -> None:
        """Raise FitnessError if the evaluator itself seems broken, not the candidates."""
        most = BROKEN_IN_A_ROW if self._ok else BROKEN_AFTER
        if self._in_a_row >= most and self._first is not None:
            raise FitnessError(
                f"{self._in_a_row} candidates in a row could not be scored, so the search was stopped; "
                f"the first failure (candidate {self._first.candidate}): {self._first.reason}"
            )


class Crew:
    """Watches a pool for a run.

    Args:
        run: Where losses are recorded.
        pool: The pool.
        notice: Called with lines for people.
    """

    def __init__(self, run: Run, pool: Pool, notice: Callable[[str], None]) -> None:
        self._run, self._pool, self._notice = run, pool, notice
        self._deaths = 0
        self._alone: float | None = None
        self._said = False

    def look(self) -> None:
        """Record what was lost since the last look."""
        state = self._pool.state()
        if state.deaths > self._deaths:
            lost, self._deaths = state.deaths - self._deaths, state.deaths
            self._run.add_event("workers_lost", {"workers": lost, "reason": state.loss})
        now = time.monotonic()
        if state.workers:
            self._alone, self._said = None, False
        elif self._alone is None:
            self._alone = now
        elif now - self._alone > ALONE_SECONDS and not self._said:
            self._said = True
            self._notice("no worker is up: waiting until the cluster has room for one; Ctrl-C stops the run")
            self._run.add_event("waiting_for_workers", {"reason": state.loss})
