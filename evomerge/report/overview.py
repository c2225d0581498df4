"""The list of runs, as plain data: what `evomerge runs` shows and the service returns."""

from __future__ import annotations

from typing import Any

from evomerge.errors import MissingError, nearest
from evomerge.report.summary import Summary
from evomerge.store import Store
from evomerge.store.lines import Counted, Line, lines, progress

STATUSES = ("queued", "starting", "running", "stopped", "failed", "finished", "interrupted", "cancelled")
LIVE = ("queued", "starting", "running")
"""Those that end by themselves."""


def overview(
    store: Store,
    *,
    status: str | None = None,
    contains: str = "",
    after: str | None = None,
    limit: int | None = None,
    newest_first: bool = False,
) -> dict[str, Any]:
    """Return runs and queued jobs.

    Args:
        store: Where they are.
        status: Only those of this status.
        contains: Only those with this in their name, in capitals or not.
        after: Begin behind the run of this name.
        limit: At most so many; None: all.
        newest_first: Turn the order around.

    Returns:
        `runs`; their number `total` whatever the limit; `next`, the name to go on behind, None at the end.
    """
    part = contains.lower()
    found = [line for line in lines(store) if status in (None, line.status) and part in line.name.lower()]
    if newest_first:
        found.reverse()
    names = [line.name for line in found]
    first = names.index(after) + 1 if after in names else 0
    page = found[first : None if limit is None else first + limit]
    counted = progress(store, [line.run_id for line in page if line.run_id is not None])
    more = first + len(page) < len(found)
    rows = [_row(line, counted.get(line.run_id or 0, Counted())) for line in page]
    return {"runs": rows, "total": len(found), "next": page[-1].name if page and more else None}


def one_run(store: Store, name: str) -> dict[str, Any]:
    """Return the line of one run or job.

    Raises:
        MissingError: There is neither.
    """
    for line in lines(store, name):
        counted = progress(store, [line.run_id]) if line.run_id is not None else {}
        return _row(line, counted.get(line.run_id or 0, Counted()))
    known = [line.name for line in lines(store)]
    raise MissingError(f'there is no run "{name}" in store {store.location}{nearest(name, known)}')


def shown(store: Store, name: str) -> dict[str, Any]:
    """Return everything `evomerge show --json` prints; a run that has not begun has nothing found yet.

    Raises:
        MissingError: There is no such run or job.
    """
    line = one_run(store, name)
    view = store.find(name)
    found = NOTHING_FOUND if view is None else Summary(view).to_json()
    queued = {} if line["priority"] is None else {"priority": line["priority"]}
    own = {key: line[key] for key in _OF_LINE}
    return {**found, **own, **queued, "error": line["error"] or found["error"]}


_OF_LINE = ("name", "status", "created", "updated")

NOTHING_FOUND: dict[str, Any] = {
    "error": "",
    "evaluations": 0,
    "outcomes": 0,
    "failures": 0,
    "best": None,
    "baselines": [],
    "gain": None,
    "gains": [],
    "verdict": "No candidate has been scored.",
    "looks_at_test": 0,
    "seconds": {"merge": 0.0, "evaluate": 0.0},
    "evaluation": {},
    "optimizer": [],
    "notes": [],
    "failed": [],
}
"""What `Summary.to_json` returns before there is a run."""


def _row(line: Line, counted: Counted) -> dict[str, Any]:
    return {
        "name": line.name,
        "status": line.status,
        "candidates": counted.candidates,
        "evaluations": counted.evaluations,
        "budget": counted.budget,
        "best_search_score": counted.best,
        "created": line.created,
        "updated": line.updated,
        "priority": line.priority,
        "error": line.error,
    }
