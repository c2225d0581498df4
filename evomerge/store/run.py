"""Writing a run: the driver's handle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, insert, select, update

from evomerge.errors import LostRunError, StoreError
from evomerge.faults import reached
from evomerge.records import Candidate, DocumentSet, Outcome
from evomerge.store.connect import insist
from evomerge.store.shapes import Snapshot
from evomerge.store.tables import (
    ACTIVITY,
    CANDIDATES,
    DOCUMENT_SETS,
    EVENTS,
    OUTCOMES,
    RUNS,
    SNAPSHOTS,
    TALLIES,
    now,
    pack,
    squeeze,
)
from evomerge.store.view import RunView, snapshot_digest

if TYPE_CHECKING:
    from evomerge.store.store import Store

Write = TypeVar("Write", bound=Callable[..., None])

STATUSES = ("running", "stopped", "failed", "finished")

SNAPSHOTS_KEPT = 3


def _insisting(method: Write) -> Write:
    """Repeat a write that the connection broke under, unless it was committed."""

    @wraps(method)
    def insisting(self: Run, *given: Any, **named: Any) -> None:
        with self._lock:
            self._beat = None
            insist(lambda: method(self, *given, **named), self._was_committed)

    return cast(Write, insisting)


class Run(RunView):
    """A run as its driver holds it; `RunView` says what it reads.

    Every method below is one transaction. It raises LostRunError, and writes nothing, when another driver
    has taken the run since; and StoreError when the store cannot be written or the driver released it.
    Two threads may use one handle.
    """

    def __init__(self, store: Store, row: Row[Any]) -> None:
        """Make it from a row of `RUN_ROW` that was read in the transaction that took the run."""
        super().__init__(store, row)
        self._held: int = row.epoch
        self._beat: float | None = None
        self._lock = threading.RLock()

    def add_candidate(self, candidate: Candidate, told_before: int) -> None:
        """Record one candidate, see `add_candidates`."""
        self.add_candidates([(candidate, told_before)])

    @_insisting
    def add_candidates(self, batch: Sequence[tuple[Candidate, int]]) -> None:
        """Record candidates, all or none.

        Args:
            batch: Candidates in the order of their numbers, each with how many outcomes the optimizer had
                been told when it was asked for it (0 for those it did not propose).

        Raises:
            StoreError: A number does not follow the last one recorded, or data is no finite JSON.
        """
        rows = [self._candidate_row(candidate, told_before) for candidate, told_before in batch]
        if not rows:
            return
        with self._writing(updated=now()) as connection:
            following = connection.execute(
                select(func.coalesce(func.max(CANDIDATES.c.number) + 1, 0)).where(
                    CANDIDATES.c.run_id == self.id
                )
            ).scalar_one()
            numbers = [row["number"] for row in rows]
            if numbers != list(range(following, following + len(rows))):
                raise StoreError(
                    f'run "{self.name}": candidates must be numbered on from {following} without gaps,'
                    f" got {numbers[:5]}"
                )
            connection.execute(insert(CANDIDATES), rows)
            reached("candidate_written")

    @_insisting
    def add_outcome(self, outcome: Outcome, fitness_digest: str) -> None:
        """Record an outcome, and an event `outcome` that says so.

        Args:
            outcome: Of a recorded candidate, on documents on which it has none yet.
            fitness_digest: Digest of how it was scored; `find_outcome` asks for it.

        Raises:
            StoreError: The candidate is unknown, has an outcome on these documents, or data is no
                finite JSON.
        """
        row = self._outcome_row(outcome, fitness_digest)
        key = {name: row[name] for name in ("run_id", "candidate", "documents")}
        where = f'run "{self.name}": candidate {outcome.candidate}'
        said = {name: row[name] for name in ("candidate", "documents", "status", "score")}
        event = pack(said, where)
        with self._writing(updated=now()) as connection:
            known, taken = connection.execute(_KNOWN_AND_TAKEN, key).one()
            if not known:
                raise StoreError(f"{where} is unknown; record the candidate before its outcome")
            if taken:
                raise StoreError(f'{where} has an outcome on "{outcome.documents}" already; it is kept')
            connection.execute(insert(OUTCOMES).values(**row, recorded=now()))
            tally = {"run_id": self.id, "split": row["split"], "status": row["status"]}
            if not connection.execute(_COUNT_ONE_MORE, {f"at_{k}": v for k, v in tally.items()}).rowcount:
                connection.execute(insert(TALLIES), {**tally, "number": 1})
            self._append_event(connection, "outcome", event)
            reached("outcome_written")

    @_insisting
    def tell(self, numbers: Sequence[int], documents: str, snapshot: Snapshot | None = None) -> None:
        """Record that the optimizer was told outcomes, and its state after that, both or neither.

        Args:
            numbers: The candidates, in the order in which the optimizer was told; may be empty.
            documents: Key of the document set of their outcomes.
            snapshot: The optimizer's state after these; None for none. The newest three are kept.

        Raises:
            StoreError: One of them has no outcome, or has been told already.
            ValueError: `snapshot.told` is not the number of outcomes told so far, these included.
        """
        with self._writing(updated=now()) as connection:
            before = connection.execute(
                select(func.coalesce(func.max(OUTCOMES.c.told) + 1, 0)).where(OUTCOMES.c.run_id == self.id)
            ).scalar_one()
            if numbers:
                self._mark_told(connection, numbers, documents, before)
            reached("tell_written")
            if snapshot is not None:
                if snapshot.told != before + len(numbers):
                    raise ValueError(f"snapshot.told is {snapshot.told}, expected {before + len(numbers)}")
                self._add_snapshot(connection, snapshot)
                reached("snapshot_written")

    @_insisting
    def add_document_set(self, key: str, ids: Mapping[str, Sequence[int]]) -> None:
        """Record which documents a set holds; recording the same again is no error.

        Args:
            key: Name of the set, such as `search@3`.
            ids: Task name to document indices, in order.

        Raises:
            StoreError: The set was recorded with other documents.
        """
        text = pack({task: list(documents) for task, documents in ids.items()}, f'document set "{key}"')
        with self._writing(updated=now()) as connection:
            known = connection.execute(
                select(DOCUMENT_SETS.c.ids).where(
                    DOCUMENT_SETS.c.run_id == self.id, DOCUMENT_SETS.c.key == key
                )
            ).scalar_one_or_none()
            if known is None:
                connection.execute(insert(DOCUMENT_SETS).values(run_id=self.id, key=key, ids=text))
            elif known != text:
                raise StoreError(
                    f'run "{self.name}": the documents of "{key}" changed since the run began;'
                    " restore the tasks' data, or start a new run"
                )

    @_insisting
    def set_status(self, status: str, error: str = "") -> None:
        """Set the status (`running`, `stopped`, `failed`, `finished`) and why it failed."""
        _check_status(status)
        with self._writing(updated=now(), status=status, error=pack(error, "the error")):
            pass
        self.status, self.error = status, error

    @_insisting
    def set_config(self, config: Mapping[str, Any]) -> None:
        """Replace the config, for a resume with, say, a larger budget."""
        with self._writing(updated=now(), config=pack(dict(config), "the config")):
            pass
        self.config = dict(config)

    @_insisting
    def set_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace the facts, for a resume on inputs whose change the user accepted."""
        with self._writing(updated=now(), facts=pack(dict(facts), "the facts")):
            pass
        self.facts = dict(facts)

    @_insisting
    def add_event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append an event."""
        text = pack(dict(data), f'event "{kind}"')
        with self._writing(updated=now()) as connection:
            self._append_event(connection, kind, text)

    def _append_event(self, connection: Connection, kind: str, text: str) -> None:
        values = {"event_run": self.id, "event_kind": kind, "event_data": text}
        connection.execute(_APPEND_EVENT, values)

    @_insisting
    def set_activity(self, data: Mapping[str, Any]) -> None:
        """Replace what the workers do at the moment."""
        values = {"at": now(), "data": pack(dict(data), "the activity")}
        with self._writing() as connection:
            changed = connection.execute(
                update(ACTIVITY).where(ACTIVITY.c.run_id == self.id).values(**values)
            )
            if not changed.rowcount:
                connection.execute(insert(ACTIVITY).values(run_id=self.id, **values))

    @_insisting
    def heartbeat(self) -> None:
        """Show that the driver is alive; due every few seconds while nothing else is written."""
        with self._writing():
            pass

    @_insisting
    def release(self, status: str, error: str = "") -> None:
        """Set the status and stop being the driver; the handle can only read from now on."""
        _check_status(status)
        with self._writing(updated=now(), status=status, error=pack(error, "the error"), owner=None):
            pass
        self.status, self.error, self.owner, self.owner_alive = status, error, None, False

    @contextmanager
    def _writing(self, **changes: Any) -> Iterator[Connection]:
        """Open a transaction that holds the run's row, so that no driver can take it before it ends."""
        with self._store.writing() as connection:
            beat = connection.execute(
                update(RUNS)
                .where(RUNS.c.id == self.id, RUNS.c.epoch == self._held, RUNS.c.owner.is_not(None))
                .values(heartbeat=now(), **changes)
                .returning(RUNS.c.heartbeat)
            ).scalar_one_or_none()
            if beat is None:
                raise self._refusal(connection)
            self._beat = beat
            yield connection

    def _was_committed(self) -> bool:
        """Return whether the last transaction is there: only the driver moves its run's heartbeat."""
        if self._beat is None:
            return False
        query = select(RUNS.c.heartbeat).where(RUNS.c.id == self.id, RUNS.c.epoch == self._held)
        with self._store.writing() as connection:
            # Waits for the transaction itself, should the server still be at it.
            return connection.execute(query.with_for_update()).scalar_one_or_none() == self._beat

    def _refusal(self, connection: Connection) -> Exception:
        current = connection.execute(select(RUNS.c.epoch).where(RUNS.c.id == self.id)).scalar_one_or_none()
        if current == self._held:
            return StoreError(f'run "{self.name}": this driver released it; take it again to write')
        return LostRunError(f"lost run {self.name}: epoch {self._held}, now {current}")

    def _candidate_row(self, candidate: Candidate, told_before: int) -> dict[str, Any]:
        what = f'run "{self.name}": candidate {candidate.number}'
        row = {
            "number": candidate.number,
            "origin": candidate.origin,
            "generation": candidate.generation,
            "idx": candidate.index,
            "told_before": told_before,
            "digest": candidate.digest,
            "genome": None if candidate.genome is None else pack(candidate.genome, f"{what}: its genome"),
        }
        recipe = pack(dict(candidate.recipe), f"{what}: its recipe", *row.values())
        return {"run_id": self.id, **row, "recipe": recipe}

    def _outcome_row(self, outcome: Outcome, fitness_digest: str) -> dict[str, Any]:
        what = f'run "{self.name}": outcome of candidate {outcome.candidate} on "{outcome.documents}"'
        record = outcome.to_json()
        values = record.pop("values")
        return {
            "run_id": self.id,
            "candidate": outcome.candidate,
            "documents": outcome.documents,
            "split": DocumentSet.of_key(outcome.documents).split,
            "status": outcome.status,
            "score": outcome.score,
            "fitness": fitness_digest,
            "told": None,
            "epoch": self._held,
            "record": pack(record, what, outcome.candidate, outcome.documents, fitness_digest),
            "document_values": squeeze(values, f"{what}: its values"),
        }

    def _mark_told(self, connection: Connection, numbers: Sequence[int], documents: str, before: int) -> None:
        keys = {"at_run": self.id, "at_documents": documents}
        connection.execute(
            _MARK_TOLD, [{**keys, "at_number": n, "place": before + i} for i, n in enumerate(numbers)]
        )
        marked = connection.execute(
            select(func.count()).where(OUTCOMES.c.run_id == self.id, OUTCOMES.c.told >= before)
        ).scalar_one()
        if marked != len(numbers):
            raise StoreError(
                f'run "{self.name}": of candidates {list(numbers)[:5]} on "{documents}" only {marked} of'
                f" {len(numbers)} have an outcome that was not told yet"
            )

    def _add_snapshot(self, connection: Connection, snapshot: Snapshot) -> None:
        state = squeeze(dict(snapshot.state), f'run "{self.name}": the optimizer\'s state')
        sequence = connection.execute(
            select(func.coalesce(func.max(SNAPSHOTS.c.sequence), 0) + 1).where(SNAPSHOTS.c.run_id == self.id)
        ).scalar_one()
        connection.execute(
            insert(SNAPSHOTS).values(
                run_id=self.id,
                sequence=sequence,
                asked=snapshot.asked,
                told=snapshot.told,
                sha256=snapshot_digest(snapshot.asked, snapshot.told, state),
                state=state,
            )
        )
        connection.execute(
            delete(SNAPSHOTS).where(
                SNAPSHOTS.c.run_id == self.id, SNAPSHOTS.c.sequence <= sequence - SNAPSHOTS_KEPT
            )
        )

    def _snapshot_damaged(self, sequence: int, why: str) -> None:
        super()._snapshot_damaged(sequence, why)
        if self.owner is not None:
            self.add_event("snapshot_damaged", {"sequence": sequence, "reason": why})


def _check_status(status: str) -> None:
    if status not in STATUSES:
        raise ValueError(f'status "{status}" is unknown; known: {", ".join(STATUSES)}')


_KNOWN_AND_TAKEN = select(
    exists().where(CANDIDATES.c.run_id == bindparam("run_id"), CANDIDATES.c.number == bindparam("candidate")),
    exists().where(
        OUTCOMES.c.run_id == bindparam("run_id"),
        OUTCOMES.c.candidate == bindparam("candidate"),
        OUTCOMES.c.documents == bindparam("documents"),
    ),
)

_APPEND_EVENT = insert(EVENTS).values(
    run_id=bindparam("event_run"),
    id=select(func.coalesce(func.max(EVENTS.c.id), 0) + 1)
    .where(EVENTS.c.run_id == bindparam("event_run"))
    .scalar_subquery(),
    at=now(),
    kind=bindparam("event_kind"),
    data=bindparam("event_data"),
)

_COUNT_ONE_MORE = (
    update(TALLIES)
    .where(
        TALLIES.c.run_id == bindparam("at_run_id"),
        TALLIES.c.split == bindparam("at_split"),
        TALLIES.c.status == bindparam("at_status"),
    )
    .values(number=TALLIES.c.number + 1)
)

_MARK_TOLD = (
    update(OUTCOMES)
    .where(
        OUTCOMES.c.run_id == bindparam("at_run"),
        OUTCOMES.c.candidate == bindparam("at_number"),
        OUTCOMES.c.documents == bindparam("at_documents"),
        OUTCOMES.c.told.is_(None),
    )
    .values(told=bindparam("place"))
)
