"""Runs, candidates, outcomes and snapshots in SQLite or PostgreSQL: the truth about every search.

One process at a time drives a run (`Store.create_run`, `Store.take_run`); any number may read it
(`Store.run`). Every write is one committed transaction that checks the run's epoch first.
"""

from evomerge.store.run import Run
from evomerge.store.shapes import Asked, Counts, Event, Log, Snapshot
from evomerge.store.store import Store
from evomerge.store.view import RunView

__all__ = ["Asked", "Counts", "Event", "Log", "Run", "RunView", "Snapshot", "Store"]
