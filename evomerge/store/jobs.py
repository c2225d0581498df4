"""The queue of a service: one job for each run that it was asked for, and the exports it makes.

A job outlives its service. Several services may share a store; each sees to the jobs it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from evomerge.errors import ConflictError, LimitError
from evomerge.store.store import Store
from evomerge.store.tables import EXPORTS, JOBS, RUNS, now, pack, unpack


@dataclass(frozen=True, slots=True)
class Job:
    """A request for a driver, and what became of it.

    Attributes:
        id: Its place in the order of submission.
        name: Of its run, which exists once a driver has begun it.
        service: The service that took it.
        digest: Digest of what was submitted; equal submissions are one job.
        config: The run's config as plain data.
        folder: What the config's paths are relative to.
        priority: Higher ones start first.
        state: `queued`, `running` (it has a driver) or `ended`.
        outcome: How it ended: `finished`, `stopped`, `failed`, `interrupted` (its driver died too often) or
            `cancelled` (before a driver began the run); empty before.
        error: Why it failed; empty otherwise.
        options: More options of the command that the driver runs.
        cancel: Empty, `stop` (after the candidates that are running) or `now`.
        epoch: The run's epoch before the present driver started; 0 if there was no run.
        attempts: How many drivers were started.
        restarts: Restarts in a row that brought no outcome.
        outcomes: The run's outcomes before the present driver started.
        handle: What the launcher knows its driver by.
        queued: When it was submitted or resumed, in Unix seconds by the database's clock.
        updated: When it last changed, likewise.
    """

    id: int
    name: str
    service: str
    digest: str
    config: Mapping[str, Any]
    folder: str
    priority: int
    state: str
    outcome: str
    error: str
    options: tuple[str, ...]
    cancel: str
    epoch: int
    attempts: int
    restarts: int
    outcomes: int
    handle: Mapping[str, Any]
    queued: float
    updated: float


@dataclass(frozen=True, slots=True)
class Export:
    """A model that a service was asked to write.

    Attributes:
        id: Its number in the store.
        run: The run's name.
        candidate: The candidate's number; None: the winner.
        state: `queued`, `running`, `done` or `failed`.
        path: The directory it is written to, on the service's machine.
        error: Why it failed; empty otherwise.
        created: When it was asked for, in Unix seconds by the database's clock.
        updated: When it last changed, likewise.
    """

    id: int
    run: str
    candidate: int | None
    state: str
    path: str
    error: str
    created: float
    updated: float


class JobQueue:
    """The jobs and exports of one service in a store.

    Args:
        store: The store.
        service: The service's identity; it changes only jobs of its own.
    """

    def __init__(self, store: Store, service: str) -> None:
        self._store, self._service = store, service

    def submit(
        self,
        name: str,
        config: Mapping[str, Any],
        folder: str,
        *,
        digest: str,
        priority: int = 0,
        key: str | None = None,
        most: int = 10_000,
    ) -> tuple[Job, bool]:
        """Queue a job.

        Args:
            name: Of the run.
            config: Its config as plain data.
            folder: What the config's paths are relative to.
            digest: Digest of what was submitted.
            priority: Higher ones start first; equals in the order of submission.
            key: Names this submission, so that a repeated one is recognised.
            most: How many may wait.

        Returns:
            The job, and whether it is new: an equal submission returns the job that it made before. A job
            that ended before its run began is replaced, unless its own key comes again.

        Raises:
            ConflictError: The name or the key was used for something else.
            LimitError: Too many wait.
        """
        text = pack(dict(config), f'job "{name}": its config')
        with self._store.writing() as connection:
            self._store.lock(connection)
            known = self._known(connection, name, key, digest)
            if known is not None:
                return known, False
            self._store.check_free(connection, name)
            waiting = select(func.count()).where(JOBS.c.state == "queued", JOBS.c.service == self._service)
            if connection.execute(waiting).scalar_one() >= most:
                raise LimitError(f"{most} jobs wait already; submit again when some have started")
            row_values = {
                "name": name,
                "service": self._service,
                "key": key,
                "digest": digest,
                "config": text,
                "folder": folder,
                "priority": priority,
                "state": "queued",
                **_FRESH,
                "attempts": 0,
            }
            connection.execute(insert(JOBS).values(**row_values, queued=now(), updated=now()))
            return _job(connection.execute(select(JOBS).where(JOBS.c.name == name)).one()), True

    def _known(self, connection: Connection, name: str, key: str | None, digest: str) -> Job | None:
        """Return the job that an equal submission made; forget one that came to nothing."""
        same = JOBS.c.name == name if key is None else or_(JOBS.c.name == name, JOBS.c.key == key)
        rows = connection.execute(select(JOBS).where(same)).all()
        for row in rows:
            if key is not None and row.key == key:
                if (row.name, row.digest) == (name, digest):
                    return _job(row)
                raise ConflictError("the Idempotency-Key was used for another submission; give each its own")
        for row in rows:
            begun = connection.execute(select(RUNS.c.id).where(RUNS.c.name == name)).first()
            if row.state == "ended" and not begun:
                connection.execute(delete(JOBS).where(JOBS.c.id == row.id))
            elif row.digest == digest:
                return _job(row)
            else:
                raise ConflictError(f'run "{name}" exists with another config; choose another name')
        return None

    def resume(
        self, name: str, config: Mapping[str, Any], folder: str, options: Sequence[str], priority: int | None
    ) -> Job:
        """Queue a driver for a run that has none, its own or one that was begun without a service.

        Raises:
            ConflictError: The job waits or runs already.
        """
        values = {**_FRESH, "state": "queued", "options": pack(list(options), "the options")}
        with self._store.writing() as connection:
            self._store.lock(connection)
            row = connection.execute(select(JOBS).where(JOBS.c.name == name)).one_or_none()
            if row is not None and row.state != "ended":
                raise ConflictError(f'run "{name}" is {row.state} already')
            if row is None:
                text = pack(dict(config), f'job "{name}": its config')
                fixed = {"name": name, "digest": "", "config": text, "folder": folder, "attempts": 0}
                values |= {**fixed, "service": self._service, "priority": priority or 0}
                connection.execute(insert(JOBS).values(**values, queued=now(), updated=now()))
            else:
                values |= {"service": self._service}
                values |= {} if priority is None else {"priority": priority}
                change = update(JOBS).where(JOBS.c.name == name)
                connection.execute(change.values(**values, queued=now(), updated=now()))
            return _job(connection.execute(select(JOBS).where(JOBS.c.name == name)).one())

    def cancel(self, name: str, *, immediately: bool = False) -> None:
        """End a run by its name, whoever began it; one that waits is taken from the queue.

        Args:
            name: The run's.
            immediately: Do not wait for the candidates that are running.

        Raises:
            MissingError: There is no such run.
            ConflictError: It has ended.
        """
        with self._store.writing() as connection:
            self._store.lock(connection)
            row = connection.execute(select(JOBS).where(JOBS.c.name == name)).one_or_none()
            values: dict[str, Any] = {}
            if row is not None and row.state == "queued":
                values = {"state": "ended", "outcome": "cancelled"}
            elif row is not None and row.state == "running":
                values = {"cancel": "now" if immediately or row.cancel == "now" else "stop"}
            if values:
                connection.execute(update(JOBS).where(JOBS.c.name == name).values(**values, updated=now()))
                return
        if row is not None and row.outcome == "cancelled" and self._store.find(name) is None:
            return
        self._store.run(name).request("now" if immediately else "stop")

    def job(self, name: str) -> Job | None:
        """Return a job; None if there is none of that name, in whatever service."""
        with self._store.reading() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.name == name)).one_or_none()
        return None if row is None else _job(row)

    def jobs(self, state: str) -> list[Job]:
        """Return this service's jobs in a state, in the order in which they start."""
        mine = select(JOBS).where(JOBS.c.service == self._service, JOBS.c.state == state)
        with self._store.reading() as connection:
            rows = connection.execute(mine.order_by(JOBS.c.priority.desc(), JOBS.c.queued, JOBS.c.id)).all()
        return [_job(row) for row in rows]

    def begin(self, job: Job, *, epoch: int, outcomes: int) -> Job | None:
        """Note that a driver is about to start; None if the job was cancelled in between."""
        values = {"state": "running", "epoch": epoch, "outcomes": outcomes, "attempts": job.attempts + 1}
        with self._store.writing() as connection:
            changed = connection.execute(
                update(JOBS)
                .where(JOBS.c.id == job.id, JOBS.c.state == "queued")
                .values(**values, handle="{}", updated=now())
            )
            if changed.rowcount != 1:
                return None
            return _job(connection.execute(select(JOBS).where(JOBS.c.id == job.id)).one())

    def set_handle(self, job: Job, handle: Mapping[str, Any]) -> None:
        """Record what the launcher knows the driver by."""
        self._change(job, handle=pack(dict(handle), "the handle"))

    def again(self, job: Job, *, restarts: int) -> None:
        """Put a job back whose driver died."""
        self._change(job, state="queued", restarts=restarts)

    def end(self, job: Job, outcome: str, error: str = "") -> None:
        """Record how a job ended."""
        self._change(job, state="ended", outcome=outcome, error=error)

    def _change(self, job: Job, **values: Any) -> None:
        with self._store.writing() as connection:
            connection.execute(update(JOBS).where(JOBS.c.id == job.id).values(**values, updated=now()))

    def add_export(self, run: str, candidate: int | None, path: str) -> Export:
        """Queue an export; one that is queued, running or done for the same directory is returned instead."""
        values = {"service": self._service, "run": run, "candidate": candidate, "path": path}
        with self._store.writing() as connection:
            self._store.lock(connection)
            same = select(EXPORTS).where(EXPORTS.c.path == path, EXPORTS.c.state != "failed")
            for row in connection.execute(same):
                return _export(row)
            made = connection.execute(
                insert(EXPORTS).values(**values, state="queued", error="", created=now(), updated=now())
            )
            number = made.inserted_primary_key[0]  # type: ignore[index]
            return _export(connection.execute(select(EXPORTS).where(EXPORTS.c.id == number)).one())

    def set_export(self, number: int, state: str, error: str = "") -> None:
        """Record how far an export is."""
        with self._store.writing() as connection:
            connection.execute(
                update(EXPORTS).where(EXPORTS.c.id == number).values(state=state, error=error, updated=now())
            )

    def exports(self, run: str | None = None, states: Iterable[str] = ()) -> list[Export]:
        """Return this service's exports by number, those of a run or in some states only if asked."""
        query = select(EXPORTS).where(EXPORTS.c.service == self._service)
        if run is not None:
            query = query.where(EXPORTS.c.run == run)
        if states:
            query = query.where(EXPORTS.c.state.in_(list(states)))
        with self._store.reading() as connection:
            return [_export(row) for row in connection.execute(query.order_by(EXPORTS.c.id))]


_FRESH = {
    "outcome": "",
    "error": "",
    "options": "[]",
    "cancel": "",
    "epoch": 0,
    "restarts": 0,
    "outcomes": 0,
    "handle": "{}",
}


def _job(row: Row[Any]) -> Job:
    what = f'job "{row.name}"'
    values = {name: getattr(row, name) for name in Job.__slots__}
    values["config"] = unpack(row.config, f"{what}: its config")
    values["options"] = tuple(unpack(row.options, f"{what}: its options"))
    values["handle"] = unpack(row.handle, f"{what}: its handle")
    return Job(**values)


def _export(row: Row[Any]) -> Export:
    return Export(**{name: getattr(row, name) for name in Export.__slots__})
