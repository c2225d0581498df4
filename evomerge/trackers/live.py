"""Tracking a run while it goes on: a thread of the driver, which never waits for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from evomerge.errors import EvomergeError
from evomerge.store import Run
from evomerge.trackers.feed import Feed
from evomerge.trackers.targets import Target

PULL_SECONDS = 1.0
"""Between looks at the log."""

END_SECONDS = 30.0
"""How long a driver that is done waits for its trackers; what they miss, `evomerge track` brings."""


class LiveTracking:
    """Feeds trackers until it is ended. A tracker that fails is left out, and an event says so once.

    Args:
        run: The driver's handle.
        targets: Where it is tracked; none: nothing is done.
        notice: Called with lines for people.
    """

    def __init__(self, run: Run, targets: Sequence[Target], notice: Callable[[str], None]) -> None:
        self._run, self._notice = run, notice
        self._feed = Feed(run, targets, self._failed)
        self._wake = threading.Event()
        self._ending: tuple[str, str] | None = None
        self._thread = (
            threading.Thread(target=self._follow, name="trackers", daemon=True) if targets else None
        )
        if self._thread is not None:
            self._thread.start()

    def end(self, status: str, error: str = "", *, seconds: float = END_SECONDS) -> None:
        """Let the trackers take in the rest; wait for them, but not longer than some seconds."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ending = (status, error)
        self._wake.set()
        thread.join(seconds)
        if thread.is_alive():
            self._say(
                "trackers",
                f"took longer than {seconds:g} s; bring the rest by `evomerge track {self._run.name}`",
            )

    def _follow(self) -> None:
        while self._ending is None:
            self._guarded(self._feed.pull)
            self._wake.wait(PULL_SECONDS)
        ending = self._ending
        self._guarded(lambda: self._feed.end(*ending))

    @staticmethod
    def _guarded(action: Callable[[], None]) -> None:
        # A store that cannot be read stops the search, which says so.
        with contextlib.suppress(EvomergeError):
            action()

    def _failed(self, target: Target, reason: str) -> None:
        self._say(str(target), reason)

    def _say(self, tracker: str, reason: str) -> None:
        self._notice(f"warning: tracker {tracker}: {reason}; the run goes on without it")
        with contextlib.suppress(EvomergeError):
            self._run.add_event("tracker_failed", {"tracker": tracker, "reason": reason})
