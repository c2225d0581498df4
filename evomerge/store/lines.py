"""Many runs at a glance: as cheap for a thousand runs of 100,000 candidates as for ten small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, and_, func, select

from evomerge.store.owner import Owner
from evomerge.store.store import Store
from evomerge.store.tables import CANDIDATES, JOBS, OUTCOMES, RUNS, now, unpack


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


@dataclass(frozen=True, slots=True)
class Counted:
    """How far a run is.

    Attributes:
        candidates: How many it has, baselines included.
        best: The best search score, baselines included; None before the first.
        evaluations: How many the optimizer has proposed.
        budget: How many it may propose; None of a run without a config of ours.
    """

    candidates: int = 0
    best: float | None = None
    evaluations: int = 0
    budget: int | None = None


_RUN_COLUMNS = (
    *(RUNS.c.id, RUNS.c.name, RUNS.c.status, RUNS.c.owner, RUNS.c.created, RUNS.c.updated, RUNS.c.epoch),
    RUNS.c.error,
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
    """Return how the job failed, or the run, if another driver has taken it since or it has no job."""
    if job is not None and job.state != "ended":
        return ""
    if job is not None and (run is None or run.epoch <= job.epoch + 1):
        return str(job.error)
    if run is None or run.status != "failed":
        return ""
    return str(unpack(run.error, f'run "{run.name}": its error'))


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


def progress(store: Store, ids: Sequence[int]) -> dict[int, Counted]:
    """Return for each run how far it is.

    Args:
        store: Where they are.
        ids: `Line.run_id` of the runs.
    """
    mine = CANDIDATES.c.run_id == RUNS.c.id
    last = select(func.max(CANDIDATES.c.number)).where(mine).scalar_subquery()
    asked = (
        select(CANDIDATES.c.idx)
        .where(mine, CANDIDATES.c.idx.is_not(None))
        .order_by(CANDIDATES.c.number.desc())
        .limit(1)
        .scalar_subquery()
    )
    ok = and_(OUTCOMES.c.run_id == RUNS.c.id, OUTCOMES.c.split == "search", OUTCOMES.c.status == "ok")
    best = select(func.max(OUTCOMES.c.score)).where(ok).scalar_subquery()
    query: Select[Any] = select(
        RUNS.c.id,
        RUNS.c.name,
        RUNS.c.config,
        (func.coalesce(last, -1) + 1).label("candidates"),
        best.label("best"),
        (func.coalesce(asked, -1) + 1).label("evaluations"),
    )
    with store.reading() as connection:
        rows = connection.execute(query.where(RUNS.c.id.in_(list(ids)))).all()
    return {row.id: Counted(row.candidates, row.best, row.evaluations, _budget(row)) for row in rows}


def _budget(row: Row[Any]) -> int | None:
    config = unpack(row.config, f'run "{row.name}": its config')
    found = (config.get("budget") or {}).get("evaluations")
    return None if found is None else int(found)
