"""What runs found, kept while nothing changes: a large run takes seconds to sum up, and many ask for it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.report.overview import one_run, shown
from evomerge.store import Store

KEPT = 64
PATIENCE = 4.0
"""An answer about a run that goes on is given again for so many times the seconds that it took."""


@dataclass(slots=True)
class _Answer:
    """One run's latest answer; one thread at a time makes a new one."""

    data: Mapping[str, Any] | None = None
    mark: tuple[Any, ...] = ()
    until: float = 0.0
    turn: threading.Lock = field(default_factory=threading.Lock)


class ShownRuns:
    """What `evomerge show --json` prints, for whoever asks the service; from any thread.

    Args:
        store: Where the runs are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Mapping[str, Any]:
        """Return what a run found.

        Raises:
            MissingError: There is no such run or job.
        """
        mark = self._mark(name)
        with self._lock:
            answer = self._answers.setdefault(name, _Answer())
            self._answers.move_to_end(name)
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        with answer.turn:
            same_status = answer.mark[:1] == mark[:1]
            if answer.data is not None and (
                answer.mark == mark or (same_status and time.monotonic() < answer.until)
            ):
                return answer.data
            began = time.monotonic()
            answer.data = shown(self._store, name)
            ended = time.monotonic()
            answer.mark, answer.until = mark, ended + PATIENCE * (ended - began)
            return answer.data

    def _mark(self, name: str) -> tuple[Any, ...]:
        """Return what changes whenever the answer may; its first item is the status."""
        line = one_run(self._store, name)
        view = self._store.find(name)
        place = () if view is None else (view.id, view.epoch, view.updated, view.last_event())
        return (line["status"], line["error"], line["priority"], line["updated"], *place)
