"""A run's candidates in pages: sorted and filtered where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Connection, Select, and_, func, select

from evomerge.store.store import Store
from evomerge.store.tables import CANDIDATES, OUTCOMES, TALLIES, unpack
from evomerge.store.view import RunView

Sort = Literal["number", "score", "generation"]
Status = Literal["pending", "ok", "stopped", "invalid", "failed"]


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
    with store.reading() as connection:
        scored, total = _totals(connection, run)
        place = slice(offset, offset + limit)
        if status == "pending":
            found = _pending(connection, run, total, descending=descending)
            total, numbers = len(found), found[place]
        elif status is not None:
            numbers = _of_outcomes(connection, run, status, sort, descending, place)
            total = scored.get(status, 0)
        elif sort == "score":
            numbers = _of_outcomes(connection, run, None, sort, descending, place)
            if place.stop > sum(scored.values()):
                rest = _pending(connection, run, total, descending=False)
                begin = max(0, offset - sum(scored.values()))
                numbers += rest[begin : begin + limit - len(numbers)]
        else:
            numbers = _of_candidates(connection, run, sort, descending, place)
        rows = _rows(connection, run, numbers)
        outcomes = _outcomes(connection, run, numbers)
    return {"total": total, "candidates": [{**rows[n], **_searched(outcomes.get(n, []))} for n in numbers]}


def _totals(connection: Connection, run: RunView) -> tuple[dict[str, int], int]:
    """Return how many search outcomes of each status there are, and how many candidates."""
    tallies = select(TALLIES.c.status, TALLIES.c.number).where(
        TALLIES.c.run_id == run.id, TALLIES.c.split == "search"
    )
    scored = {row.status: row.number for row in connection.execute(tallies)}
    last = select(func.max(CANDIDATES.c.number)).where(CANDIDATES.c.run_id == run.id)
    highest = connection.execute(last).scalar_one()
    return scored, 0 if highest is None else highest + 1


def _of_candidates(
    connection: Connection, run: RunView, sort: Sort, descending: bool, place: slice
) -> list[int]:
    keys = [CANDIDATES.c.number] if sort == "number" else [CANDIDATES.c.generation, CANDIDATES.c.number]
    query = select(CANDIDATES.c.number).where(CANDIDATES.c.run_id == run.id)
    query = query.order_by(*(key.desc() if descending else key for key in keys))
    return _slice(connection, query, place)


def _of_outcomes(
    connection: Connection, run: RunView, status: str | None, sort: Sort, descending: bool, place: slice
) -> list[int]:
    """Return candidates by their search outcomes: read from an index, without the candidates' table.

    Joined the other way round SQLite looks through all outcomes for every candidate.
    """
    query = select(OUTCOMES.c.candidate).where(OUTCOMES.c.run_id == run.id, OUTCOMES.c.split == "search")
    if status is not None:
        query = query.where(OUTCOMES.c.status == status)
    key: Any = OUTCOMES.c.score if sort == "score" else OUTCOMES.c.candidate
    if sort == "generation":
        same = and_(CANDIDATES.c.run_id == OUTCOMES.c.run_id, CANDIDATES.c.number == OUTCOMES.c.candidate)
        query, key = query.join_from(OUTCOMES, CANDIDATES, same), CANDIDATES.c.generation
    order = key.desc() if descending else key.asc()
    if sort == "score":
        order = order.nulls_last()
    return _slice(connection, query.order_by(order, OUTCOMES.c.candidate), place)


def _pending(connection: Connection, run: RunView, total: int, *, descending: bool) -> list[int]:
    """Return the candidates without an outcome on the search documents."""
    query = select(OUTCOMES.c.candidate).where(OUTCOMES.c.run_id == run.id, OUTCOMES.c.split == "search")
    known = set(connection.execute(query).scalars())
    return sorted(set(range(total)) - known, reverse=descending)


def _slice(connection: Connection, query: Select[Any], place: slice) -> list[int]:
    page = query.offset(place.start).limit(place.stop - place.start)
    return list(connection.execute(page).scalars())


def _rows(connection: Connection, run: RunView, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    number = CANDIDATES.c.number
    columns = (number, CANDIDATES.c.origin, CANDIDATES.c.generation, CANDIDATES.c.idx, CANDIDATES.c.digest)
    query = select(*columns).where(CANDIDATES.c.run_id == run.id, number.in_(numbers))
    return {
        row.number: {
            "number": row.number,
            "origin": row.origin,
            "generation": row.generation,
            "index": row.idx,
            "digest": row.digest,
        }
        for row in connection.execute(query)
    }


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
        row = _rows(connection, run, [number])[number]
        outcomes = _outcomes(connection, run, [number])
    genome = None if candidate.genome is None else list(candidate.genome)
    return {**row, **_searched(outcomes.get(number, [])), "genome": genome, "recipe": dict(candidate.recipe)}
