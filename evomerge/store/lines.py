"""Many runs at a glance: as cheap for a thousand runs of 100,000 candidates as for ten small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, and_, func, select

from evomerge.store.owner import Owner
from evomerge.store.store import Store
from evomerge.store.tables import CANDIDATES, JOBS, OUTCOMES, RUNS, now


@dataclass(frozen=True, slots=True)
class Line:
    """One run, one job, or both of one name.

    Attributes:
        name: The run's name.
        status: `queued`, `starting`, `running`, `stopped`, `failed`, `finished`, `interrupted` (its driver is
            gone) or `cancelled` (before it began).
        error: Why its last driver failed; empty otherwise. The run may have been begun or ended before.
        created: When it began or was submitted, in Unix seconds by the database's clock.
        updated: When it last changed, likewise.
        priority: Its job's; None for a run without one.
    """

    name: str
    status: str
    error: str
    created: float
    updated: float
    priority: int | None
    run_id: int | None


_RUN_COLUMNS = (
    *(RUNS.c.id, RUNS.c.name, RUNS.c.status, RUNS.c.owner, RUNS.c.created, RUNS.c.updated, RUNS.c.epoch),
    (now() - RUNS.c.heartbeat).label("silence"),
)
_JOB_COLUMNS = (
    *(JOBS.c.name, JOBS.c.state, JOBS.c.outcome, JOBS.c.error, JOBS.c.priority, JOBS.c.epoch),
    *(JOBS.c.queued, JOBS.c.updated),
)


def lines(store: Store, name: str | None = None) -> list[Line]:
    """Return all runs and jobs, oldest first, or those of one name."""
    runs: Select[Any] = select(*_RUN_COLUMNS)
    jobs: Select[Any] = select(*_JOB_COLUMNS)
    if name is not None:
        runs, jobs = runs.where(RUNS.c.name == name), jobs.where(JOBS.c.name == name)
    with store.reading() as connection:
        run_rows = {row.name: row for row in connection.execute(runs)}
        job_rows = {row.name: row for row in connection.execute(jobs)}
    found = [_line(name, run_rows.get(name), job_rows.get(name)) for name in {**run_rows, **job_rows}]
    return sorted(found, key=lambda line: (line.created, line.name))


def _line(name: str, run: Row[Any] | None, job: Row[Any] | None) -> Line:
    times = [row.updated for row in (run, job) if row is not None]
    created = run.created if run is not None else job.queued if job is not None else 0.0
    return Line(
        name=name,
        status=_status(run, job),
        error=_error(run, job),
        created=created,
        updated=max(times),
        priority=None if job is None else job.priority,
        run_id=None if run is None else run.id,
    )


def _error(run: Row[Any] | None, job: Row[Any] | None) -> str:
    """Return how the job failed, unless another driver has taken the run since."""
    if job is None or job.state != "ended" or (run is not None and run.epoch > job.epoch + 1):
        return ""
    return str(job.error)


def _status(run: Row[Any] | None, job: Row[Any] | None) -> str:
    owner = None if run is None else Owner.of_json(run.owner)
    if run is not None and run.status == "running" and owner is not None and owner.alive(run.silence):
        return "running"
    if job is not None and job.state != "ended":
        begun = run is not None and run.epoch > job.epoch  # its driver writes the report, or has just died
        return "queued" if job.state == "queued" else "running" if begun else "starting"
    if run is None:
        return "" if job is None else str(job.outcome)
    return "interrupted" if run.status == "running" else str(run.status)


def progress(store: Store, ids: Sequence[int]) -> dict[int, tuple[int, float | None]]:
    """Return for each run how many candidates it has, and its best search score.

    Args:
        store: Where they are.
        ids: `Line.run_id` of the runs.
    """
    last = select(func.max(CANDIDATES.c.number)).where(CANDIDATES.c.run_id == RUNS.c.id).scalar_subquery()
    ok = and_(OUTCOMES.c.run_id == RUNS.c.id, OUTCOMES.c.split == "search", OUTCOMES.c.status == "ok")
    best = select(func.max(OUTCOMES.c.score)).where(ok).scalar_subquery()
    query = select(RUNS.c.id, (func.coalesce(last, -1) + 1).label("candidates"), best.label("best"))
    with store.reading() as connection:
        rows = connection.execute(query.where(RUNS.c.id.in_(list(ids)))).all()
    return {row.id: (row.candidates, row.best) for row in rows}
