"""Reading a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, delete, func, insert, select

from evomerge.errors import ConflictError, MissingError, StoreError
from evomerge.records import Candidate, Outcome
from evomerge.store.connect import Result, insist
from evomerge.store.owner import Owner
from evomerge.store.shapes import Asked, Counts, Event, Log, Snapshot
from evomerge.store.tables import (
    ACTIVITY,
    CANDIDATES,
    DOCUMENT_SETS,
    EVENTS,
    OUTCOMES,
    REQUESTS,
    RUNS,
    SNAPSHOTS,
    TALLIES,
    intact,
    now,
    unpack,
    unsqueeze,
)

if TYPE_CHECKING:
    from evomerge.store.store import Store

_log = logging.getLogger(__name__)

_SAME_CANDIDATE = and_(CANDIDATES.c.run_id == OUTCOMES.c.run_id, CANDIDATES.c.number == OUTCOMES.c.candidate)

_WITHOUT_RECIPE = ("number", "origin", "generation", "idx", "digest")

RUN_ROW = select(RUNS, (now() - RUNS.c.heartbeat).label("silence"))
"""What a RunView is made of."""


class RunView:
    """A run, read only. Attributes are as of when it was fetched, methods read the store.

    Attributes:
        id: Its number in the store.
        name: Its name, unique in the store.
        status: `running`, `stopped`, `failed` or `finished`. It stays `running` when a driver is killed:
            look at `owner_alive`.
        config: What the user configured.
        facts: What was frozen at its start, such as fingerprints and versions.
        epoch: How often a driver took it.
        created: When it began, in Unix seconds by the database's clock.
        updated: When it last changed, likewise.
        error: Why it failed; empty otherwise.
        owner: Its driver; None when it has none.
        owner_alive: Whether that driver is alive.
    """

    def __init__(self, store: Store, row: Row[Any]) -> None:
        """Make it from a row of `RUN_ROW`."""
        self._store = store
        self.id: int = row.id
        self.name: str = row.name
        self.status: str = row.status
        self.config: dict[str, Any] = unpack(row.config, f'run "{row.name}": its config')
        self.facts: dict[str, Any] = unpack(row.facts, f'run "{row.name}": its facts')
        self.epoch: int = row.epoch
        self.created: float = row.created
        self.updated: float = row.updated
        self.error: str = unpack(row.error, f'run "{row.name}": its error')
        with intact(f'run "{row.name}": its owner'):
            self.owner = Owner.of_json(row.owner)
            self.owner_alive = self.owner is not None and self.owner.alive(row.silence)

    def candidates(self, first: int = 0, *, whole: bool = True) -> list[Candidate]:
        """Return the candidates by number.

        Args:
            first: From this number on.
            whole: Read genome and recipe too; without, `Candidate.genome` is None and `recipe` empty, and
                100,000 candidates are read in a second.
        """
        columns = CANDIDATES.c if whole else [CANDIDATES.c[name] for name in _WITHOUT_RECIPE]
        mine = (CANDIDATES.c.run_id == self.id, CANDIDATES.c.number >= first)
        query = select(*columns).where(*mine).order_by(CANDIDATES.c.number)
        if whole:
            return [self._candidate(row) for row in self._rows(query)]
        return [
            Candidate(row.number, row.origin, row.generation, row.idx, None, {}, row.digest)
            for row in self._rows(query)
        ]

    def candidate(self, number: int) -> Candidate:
        """Return one candidate; StoreError if there is none with that number."""
        query = select(CANDIDATES).where(CANDIDATES.c.run_id == self.id, CANDIDATES.c.number == number)
        for row in self._rows(query):
            return self._candidate(row)
        raise MissingError(f'run "{self.name}": there is no candidate {number}')

    def outcomes(self, documents: str | None = None, *, values: bool = True) -> list[Outcome]:
        """Return outcomes by candidate number, then by documents.

        Args:
            documents: Key of a document set; None for all.
            values: Read the per-document values too; without, `Outcome.values` is empty and 100,000
                outcomes are read in seconds.
        """
        query = _outcomes(OUTCOMES.c.run_id == self.id, values=values)
        if documents is not None:
            query = query.where(OUTCOMES.c.documents == documents)
        rows = self._rows(query.order_by(OUTCOMES.c.candidate, OUTCOMES.c.documents))
        return [self._outcome(row) for row in rows]

    def outcome(self, number: int, documents: str) -> Outcome | None:
        """Return a candidate's outcome on a document set; None if it has none yet."""
        query = _outcomes(
            OUTCOMES.c.run_id == self.id,
            OUTCOMES.c.candidate == number,
            OUTCOMES.c.documents == documents,
        )
        return next((self._outcome(row) for row in self._rows(query)), None)

    def find_outcome(
        self, digest: str, fitness_digest: str, documents: str, also: Sequence[int] = ()
    ) -> Outcome | None:
        """Return the first `ok` outcome of an equal recipe on the same documents, so repeats are free.

        Args:
            digest: The recipe's digest.
            fitness_digest: Digest of how it was scored.
            documents: Key of the document set.
            also: Other runs to look at, see `alike`; the run's own outcomes come first.
        """
        query = (
            _outcomes(
                CANDIDATES.c.run_id.in_([self.id, *also]),
                CANDIDATES.c.digest == digest,
                OUTCOMES.c.documents == documents,
                OUTCOMES.c.fitness == fitness_digest,
                OUTCOMES.c.status == "ok",
            )
            .join_from(CANDIDATES, OUTCOMES, _SAME_CANDIDATE)
            .order_by(CANDIDATES.c.run_id != self.id, CANDIDATES.c.run_id, CANDIDATES.c.number)
            .limit(1)
        )
        return next((self._outcome(row) for row in self._rows(query)), None)

    def alike(self) -> list[int]:
        """Return other runs of the store that score as this one: same tasks, libraries and `workers` section.

        Runs that are damaged in the store are passed over.
        """
        rows = self._rows(select(RUNS.c.id, RUNS.c.config, RUNS.c.facts).where(RUNS.c.id != self.id))
        own = _scoring(self.config, self.facts)
        found = []
        for row in rows:
            what = f"run {row.id}"
            with suppress(StoreError):
                if _scoring(unpack(row.config, what), unpack(row.facts, what)) == own:
                    found.append(int(row.id))
        return found

    def log(self, after: Snapshot | None = None) -> Log:
        """Return what to replay on top of a snapshot, as of one moment.

        Args:
            after: Leave out what this snapshot has seen; None for the whole log.
        """
        asked, told = (after.asked, after.told) if after else (0, 0)
        asks = (
            select(CANDIDATES)
            .where(CANDIDATES.c.run_id == self.id, CANDIDATES.c.idx >= asked)
            .order_by(CANDIDATES.c.idx)
        )
        tells = _outcomes(OUTCOMES.c.run_id == self.id, OUTCOMES.c.told >= told).order_by(OUTCOMES.c.told)
        waits = (
            _outcomes(
                OUTCOMES.c.run_id == self.id,
                OUTCOMES.c.told.is_(None),
                OUTCOMES.c.split == "search",
                CANDIDATES.c.idx.is_not(None),
            )
            .join_from(OUTCOMES, CANDIDATES, _SAME_CANDIDATE)
            .order_by(OUTCOMES.c.candidate, OUTCOMES.c.documents)
        )
        asked_rows, told_rows, waiting_rows = self._read(
            lambda connection: [connection.execute(query).all() for query in (asks, tells, waits)]
        )
        if [row.told for row in told_rows] != list(range(told, told + len(told_rows))):
            raise StoreError(
                f'run "{self.name}": the order of its outcomes is damaged in the store; '
                "restore the store from a copy"
            )
        return Log(
            tuple(Asked(self._candidate(row), row.told_before) for row in asked_rows),
            tuple(self._outcome(row) for row in told_rows),
            tuple(self._outcome(row) for row in waiting_rows),
        )

    def document_set(self, key: str) -> dict[str, list[int]] | None:
        """Return the documents of a set by task, or None if the run has no such set."""
        query = select(DOCUMENT_SETS.c.ids).where(
            DOCUMENT_SETS.c.run_id == self.id, DOCUMENT_SETS.c.key == key
        )
        for row in self._rows(query):
            ids: dict[str, list[int]] = unpack(row.ids, f'run "{self.name}": document set {key}')
            return ids
        return None

    def latest_snapshot(self) -> Snapshot | None:
        """Return the newest undamaged snapshot, or None; damaged ones are logged and passed over."""
        query = select(SNAPSHOTS).where(SNAPSHOTS.c.run_id == self.id).order_by(SNAPSHOTS.c.sequence.desc())
        for row in self._rows(query):
            try:
                with intact("it"):
                    if snapshot_digest(row.asked, row.told, row.state) != row.sha256:
                        raise StoreError("its checksum differs")
                return Snapshot(row.asked, row.told, unsqueeze(row.state, "its state"))
            except StoreError as error:
                self._snapshot_damaged(row.sequence, str(error))
        return None

    def _snapshot_damaged(self, sequence: int, why: str) -> None:
        _log.warning('run "%s": snapshot %d is damaged (%s); using the one before', self.name, sequence, why)

    def events(
        self, after: int = 0, *, kind: str | Collection[str] | None = None, limit: int | None = None
    ) -> list[Event]:
        """Return the events whose id is above `after`, in order.

        Args:
            after: The id.
            kind: Only those of this kind or these kinds; None: all.
            limit: At most so many; None: all.
        """
        query = select(EVENTS).where(EVENTS.c.run_id == self.id, EVENTS.c.id > after)
        if kind is not None:
            query = query.where(EVENTS.c.kind.in_([kind] if isinstance(kind, str) else list(kind)))
        return [
            Event(row.id, row.at, row.kind, unpack(row.data, f'run "{self.name}": event {row.id}'))
            for row in self._rows(query.order_by(EVENTS.c.id).limit(limit))
        ]

    def last_event(self) -> int:
        """Return the id of the newest event, 0 if there is none."""
        query = select(func.coalesce(func.max(EVENTS.c.id), 0).label("last"))
        return int(self._rows(query.where(EVENTS.c.run_id == self.id))[0].last)

    def activity(self) -> tuple[float, dict[str, Any]] | None:
        """Return when the driver last said what its workers do, in Unix seconds, and what; None: never."""
        for row in self._rows(select(ACTIVITY).where(ACTIVITY.c.run_id == self.id)):
            return row.at, unpack(row.data, f'run "{self.name}": its activity')
        return None

    def request(self, action: str) -> None:
        """Ask the present driver for something: `stop` after the running candidates, or `now`.

        Raises:
            ConflictError: The run has no living driver.
        """
        if action not in ("stop", "now"):
            raise ValueError(f'request "{action}" is unknown; known: stop, now')
        view = self._store.run(self.name)
        if not view.owner_alive:
            status = "interrupted" if view.status == "running" else view.status
            raise ConflictError(f'run "{self.name}" has no driver that could stop; it is {status}')
        with self._store.writing() as connection:
            connection.execute(delete(REQUESTS).where(REQUESTS.c.run_id == self.id))
            connection.execute(
                insert(REQUESTS).values(run_id=self.id, epoch=view.epoch, action=action, at=now())
            )

    def requested(self) -> str:
        """Return what was asked of the driver of this epoch; empty for nothing."""
        mine = (REQUESTS.c.run_id == self.id, REQUESTS.c.epoch == self.epoch)
        return next((row.action for row in self._rows(select(REQUESTS.c.action).where(*mine))), "")

    def counts(self) -> Counts:
        """Return numbers for progress, as of one moment; as cheap for 100,000 candidates as for ten."""
        best = and_(OUTCOMES.c.run_id == self.id, OUTCOMES.c.split == "search", OUTCOMES.c.status == "ok")
        with self._store.reading() as connection:
            last = connection.execute(
                select(func.max(CANDIDATES.c.number)).where(CANDIDATES.c.run_id == self.id)
            ).scalar_one()
            tallies = connection.execute(select(TALLIES).where(TALLIES.c.run_id == self.id)).all()
            score = connection.execute(select(func.max(OUTCOMES.c.score)).where(best)).scalar_one()
            candidate = connection.execute(
                select(func.min(OUTCOMES.c.candidate)).where(best, OUTCOMES.c.score == score)
            ).scalar_one()
        outcomes: dict[str, dict[str, int]] = {}
        for row in tallies:
            outcomes.setdefault(row.split, {})[row.status] = row.number
        return Counts(0 if last is None else last + 1, outcomes, candidate, score)

    def _rows(self, query: Select[Any]) -> list[Row[Any]]:
        return self._read(lambda connection: list(connection.execute(query).all()))

    def _read(self, look: Callable[[Connection], Result]) -> Result:
        """Read as of one moment, again if the connection breaks."""

        def once() -> Result:
            with self._store.reading() as connection:
                return look(connection)

        return cast(Result, insist(once))

    def _candidate(self, row: Row[Any]) -> Candidate:
        what = f'run "{self.name}": candidate {row.number}'
        with intact(what):
            genome = None if row.genome is None else tuple(unpack(row.genome, what))
        beside = (row.number, row.origin, row.generation, row.idx, row.told_before, row.digest, row.genome)
        recipe = unpack(row.recipe, what, *beside)
        with intact(what):
            return Candidate(row.number, row.origin, row.generation, row.idx, genome, recipe, row.digest)

    def _outcome(self, row: Row[Any]) -> Outcome:
        what = f'run "{self.name}": an outcome'
        record = unpack(row.record, what, row.candidate, row.documents, row.fitness)
        values = unsqueeze(row.document_values, what) if "document_values" in row._fields else {}
        with intact(what):
            return Outcome.from_json({**record, "values": values})


def snapshot_digest(asked: int, told: int, state: bytes) -> str:
    """Return the checksum of a snapshot's row."""
    return hashlib.sha256(b"%d %d " % (asked, told) + state).hexdigest()


def _outcomes(*where: ColumnElement[bool], values: bool = True) -> Select[Any]:
    columns = [OUTCOMES.c[name] for name in ("candidate", "documents", "fitness", "told", "record")]
    if values:
        columns.append(OUTCOMES.c.document_values)
    return select(*columns).where(*where)


def _scoring(config: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a score depends on besides the model, as far as a store knows: not the kind of machine."""
    workers = config.get("workers", {})
    arithmetic = ("engine", "device", "dtype", "cpus", "threads", "gpus", "tensor_parallel")
    return facts.get("fitness"), facts.get("versions"), *(workers.get(key) for key in arithmetic)
