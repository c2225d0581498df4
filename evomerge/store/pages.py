"""A run's candidates in pages: sorted and filtered where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Connection, and_, func, select

from evomerge.store.store import Store
from evomerge.store.tables import CANDIDATES, OUTCOMES, unpack
from evomerge.store.view import RunView

Sort = Literal["number", "score", "generation"]
Status = Literal["pending", "ok", "stopped", "invalid", "failed"]

_SEARCHED = and_(
    OUTCOMES.c.run_id == CANDIDATES.c.run_id,
    OUTCOMES.c.candidate == CANDIDATES.c.number,
    OUTCOMES.c.split == "search",
)


def candidate_page(
    store: Store,
    run: RunView,
    *,
    status: Status | None = None,
    sort: Sort = "number",
    descending: bool = False,
    offset: int = 0,
    limit: int = 100,
) -> dict[str, Any]:
    """Return candidates with their outcomes, without genome, recipe and per-document values.

    Args:
        store: The run's store.
        run: The run.
        status: Of the outcome on the search documents; `pending`: there is none yet.
        sort: `number`, `generation`, or `score` on the search documents, those without one last.
        descending: Turn the order around.
        offset: How many to pass over.
        limit: At most so many.

    Returns:
        `candidates`, and `total`, their number whatever offset and limit.
    """
    number = CANDIDATES.c.number
    base = select(CANDIDATES).outerjoin(OUTCOMES, _SEARCHED).where(CANDIDATES.c.run_id == run.id)
    if status is not None:
        wanted = OUTCOMES.c.status.is_(None) if status == "pending" else OUTCOMES.c.status == status
        base = base.where(wanted)
    key = {"number": number, "score": OUTCOMES.c.score, "generation": CANDIDATES.c.generation}[sort]
    order = key.desc() if descending else key.asc()
    order = order.nulls_last() if sort == "score" else order
    columns = (number, CANDIDATES.c.origin, CANDIDATES.c.generation, CANDIDATES.c.idx, CANDIDATES.c.digest)
    page = base.with_only_columns(*columns, maintain_column_froms=True)
    with store.reading() as connection:
        total = connection.execute(
            base.with_only_columns(func.count(), maintain_column_froms=True)
        ).scalar_one()
        rows = connection.execute(page.order_by(order, number).offset(offset).limit(limit)).all()
        outcomes = _outcomes(connection, run, [row.number for row in rows])
    found = [
        {
            "number": row.number,
            "origin": row.origin,
            "generation": row.generation,
            "index": row.idx,
            "digest": row.digest,
            **_searched(outcomes.get(row.number, [])),
        }
        for row in rows
    ]
    return {"total": total, "candidates": found}


def _outcomes(
    connection: Connection, run: RunView, numbers: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """Return the outcomes of candidates as plain data, without per-document values."""
    columns = (OUTCOMES.c.candidate, OUTCOMES.c.split, OUTCOMES.c.recorded, OUTCOMES.c.record)
    mine = and_(OUTCOMES.c.run_id == run.id, OUTCOMES.c.candidate.in_(list(numbers)))
    found: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(select(*columns).where(mine)):
        record = unpack(row.record, f'run "{run.name}": an outcome')
        del record["candidate"]
        found.setdefault(row.candidate, []).append({**record, "split": row.split, "at": row.recorded})
    return found


def _searched(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    searched = next((outcome for outcome in outcomes if outcome["split"] == "search"), None)
    return {
        "status": "pending" if searched is None else searched["status"],
        "score": None if searched is None else searched["score"],
        "outcomes": outcomes,
    }


def whole_candidate(store: Store, run: RunView, number: int) -> dict[str, Any]:
    """Return one candidate as `candidate_page` does, with genome and recipe.

    Raises:
        MissingError: There is none of that number.
    """
    candidate = run.candidate(number)
    with store.reading() as connection:
        outcomes = _outcomes(connection, run, [number])
    row = {
        "number": number,
        "origin": candidate.origin,
        "generation": candidate.generation,
        "index": candidate.index,
        "digest": candidate.digest,
        **_searched(outcomes.get(number, [])),
    }
    genome = None if candidate.genome is None else list(candidate.genome)
    return {**row, "genome": genome, "recipe": dict(candidate.recipe)}
