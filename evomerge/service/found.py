"""What runs found, computed once for each state of a run: intervals of a large run take seconds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from evomerge.report.overview import one_run, shown
from evomerge.store import Store

KEPT = 64


class Found:
    """Returns what `evomerge show --json` prints, and keeps it until the run changes.

    Args:
        store: Where the runs are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[str, tuple[dict[str, Any], dict[str, Any]]] = OrderedDict()
        self._computing: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> dict[str, Any]:
        """Return what a run found; the caller must not change it.

        Raises:
            MissingError: There is no such run or job.
        """
        one_run(self._store, name)
        with self._lock:
            computing = self._computing.setdefault(name, threading.Lock())
        with computing:  # who asks for the same meanwhile, waits for it
            line = one_run(self._store, name)
            kept = self._kept.get(name)
            if kept is None or kept[0] != line:
                kept = line, shown(self._store, name)
            with self._lock:
                self._kept[name] = kept
                self._kept.move_to_end(name)
                while len(self._kept) > KEPT:
                    self._computing.pop(self._kept.popitem(last=False)[0], None)
        return kept[1]
