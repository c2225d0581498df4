"""How a search went, from its first evaluation to its latest, in a bounded number of points."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, and_, func, select

from evomerge.store.store import Store
from evomerge.store.tables import CANDIDATES, EVENTS, OUTCOMES
from evomerge.store.view import RunView

WINDOW = 20
"""How many scores the moving mean takes in."""


def search_curve(store: Store, run: RunView, most: int) -> dict[str, Any]:
    """Return the search scores of the optimizer's candidates in the order in which it proposed them.

    Args:
        store: The run's store.
        run: The run.
        most: At most so many points; more evaluations than that are taken together in equal parts.

    Returns:
        `evaluations`, their number; `event`, the id of the newest event then; `points`, each with `at` (its
        last evaluation, from 1), `candidate` and `score` of the best in it, `best` so far, `mean` of the last
        `WINDOW` scores, and `failed`, how many of it have no score. Those that were stopped are left out.
    """
    scored = and_(
        OUTCOMES.c.run_id == CANDIDATES.c.run_id,
        OUTCOMES.c.candidate == CANDIDATES.c.number,
        OUTCOMES.c.split == "search",
    )
    query: Select[Any] = (
        select(CANDIDATES.c.number, OUTCOMES.c.status, OUTCOMES.c.score)
        .join(OUTCOMES, scored)
        .where(CANDIDATES.c.run_id == run.id, CANDIDATES.c.idx.is_not(None), OUTCOMES.c.status != "stopped")
        .order_by(CANDIDATES.c.number)
    )
    newest = select(func.coalesce(func.max(EVENTS.c.id), 0)).where(EVENTS.c.run_id == run.id)
    with store.reading() as connection:
        event = connection.execute(newest).scalar_one()
        rows = connection.execute(query).all()
    return {"evaluations": len(rows), "event": event, "points": _points(rows, -(-len(rows) // most) or 1)}


def _points(rows: Sequence[Row[Any]], size: int) -> list[dict[str, Any]]:
    """Return one point for each `size` rows."""
    last: deque[float] = deque(maxlen=WINDOW)
    best: float | None = None
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        scores = [(row.score, row.number) for row in part if row.score is not None]
        last.extend(score for score, _ in scores)
        top, candidate = max(scores, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
        if top is not None:
            best = top if best is None else max(best, top)
        found.append(
            {
                "at": start + len(part),
                "candidate": candidate,
                "score": top,
                "best": best,
                "mean": sum(last) / len(last) if last else None,
                "failed": len(part) - len(scores),
            }
        )
    return found
