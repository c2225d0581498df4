"""From a run's log in the store to its trackers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from evomerge.errors import UserError
from evomerge.records import Candidate, Outcome
from evomerge.report.summary import Summary
from evomerge.store import RunView
from evomerge.trackers.base import Ending, Scored, TrackedRun, Tracker
from evomerge.trackers.targets import Target


class Feed:
    """Feeds trackers with one run; `pull` as often as one likes, `end` once.

    Steps count the outcomes in the order of the run's log, so that they are the same whoever counts.

    Args:
        run: The run.
        targets: Where it is tracked.
        failed: Called once for a target that does not work, with the reason in one line; it is left out
            from then on.
    """

    def __init__(
        self, run: RunView, targets: Sequence[Target], failed: Callable[[Target, str], None]
    ) -> None:
        self._run, self._failed = run, failed
        self._waiting = list(targets)
        self._trackers: dict[Target, Tracker] = {}
        self._has: dict[Target, int] = {}
        self._candidates: list[Candidate] = []
        self._event = 0
        self._begun, self._given = False, 0
        self._step, self._failures = 0, 0
        self._best: float | None = None

    @property
    def step(self) -> int:
        """How many outcomes it has read."""
        return self._step

    @property
    def known(self) -> dict[Target, int]:
        """What each target had already."""
        return dict(self._has)

    def pull(self) -> None:
        """Give the trackers what is new in the store."""
        self._start()
        scored = [self._scored(outcome, at) for outcome, at in list(self._new())]
        candidates = self._candidates[self._given :]
        self._begun, self._given = True, len(self._candidates)
        if candidates or scored:
            for target, tracker in list(self._trackers.items()):
                missing = [entry for entry in scored if entry.step > self._has[target]]
                self._guarded(target, lambda: tracker.record(candidates, missing))  # noqa: B023 (runs at once)

    def end(self, status: str, error: str = "") -> None:
        """Give the trackers the rest, say how the session ended, and let go of them."""
        self.pull()
        summary = Summary(self._run)
        scores: dict[str, float] = {}
        if summary.chosen:
            found = ((key, summary.outcomes.get((summary.best or 0, key))) for key in ("select", "test"))
            scores = {key: outcome.score for key, outcome in found if outcome and outcome.score is not None}
        winner = summary.best if summary.chosen else None
        ending = Ending(status, error, summary.verdict, winner, scores)
        for target, tracker in list(self._trackers.items()):
            self._guarded(target, lambda: tracker.finished(ending))  # noqa: B023 (runs at once)
        self.close()

    def close(self) -> None:
        """Let go of the trackers."""
        for target, tracker in list(self._trackers.items()):
            self._guarded(target, tracker.close)
        self._trackers.clear()

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, []
        run = self._run
        identity = hashlib.sha256(f"{run.name} {run.created.hex()}".encode()).hexdigest()[:16]
        tracked = TrackedRun(identity, run.name, run.config, run.facts)
        for target in waiting:
            self._guarded(target, lambda: self._open(target, tracked))  # noqa: B023 (runs at once)

    def _open(self, target: Target, run: TrackedRun) -> None:
        self._trackers[target] = target.make()
        self._has[target] = self._trackers[target].started(run)

    def _guarded(self, target: Target, action: Callable[[], None]) -> None:
        """Run an action of another program's client, which may raise whatever it likes."""
        try:
            action()
        except Exception as problem:
            tracker = self._trackers.pop(target, None)
            line = " ".join(str(problem).split())[:300]
            self._failed(
                target, line if isinstance(problem, UserError) else f"{type(problem).__name__}: {line}"
            )
            if tracker is not None:
                with contextlib.suppress(Exception):
                    tracker.close()

    def _new(self) -> Iterator[tuple[Outcome, float | None]]:
        """Yield the outcomes since the last call, without values."""
        # Outcomes are read before the events that name them, candidates after both.
        known = (
            {} if self._begun else {(o.candidate, o.documents): o for o in self._run.outcomes(values=False)}
        )
        events = self._run.events(self._event, kind="outcome")
        self._candidates += self._run.candidates(len(self._candidates))
        named = {(event.data["candidate"], event.data["documents"]) for event in events}
        for key, outcome in known.items():
            if key not in named:  # of a store whose outcomes were no events yet
                yield outcome, None
        for event in events:
            self._event = event.id
            key = (event.data["candidate"], event.data["documents"])
            found = known.get(key) or self._run.outcome(*key)
            if found is not None:
                yield replace(found, values={}), event.at

    def _scored(self, outcome: Outcome, at: float | None) -> Scored:
        candidate = self._candidates[outcome.candidate]
        self._step += 1
        self._failures += outcome.score is None
        searched = candidate.index is not None and outcome.documents.startswith("search")
        if searched and outcome.status == "ok" and outcome.score is not None:
            self._best = max(outcome.score, outcome.score if self._best is None else self._best)
        return Scored(self._step, at, candidate, outcome, self._best, self._failures)
