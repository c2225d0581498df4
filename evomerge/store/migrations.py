"""From the tables of an older version to the present ones, step by step.

Each step is written with alembic's operations and stays as it was released: it says what the tables were
then, and does not look at `tables.py`. A test holds the sum of all steps equal to `tables.py`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, RowMapping, text

from evomerge.errors import StoreError
from evomerge.store.owner import Owner

Step = Callable[[Operations], None]


def upgrade(connection: Connection, version: int, target: int, place: str) -> None:
    """Bring the tables from a version to another, within the connection's transaction.

    Args:
        connection: Where nobody else changes tables at the moment.
        version: Of the tables, at least 1.
        target: What they become.
        place: The store, for messages.

    Raises:
        StoreError: A driver of another version is at work in the store.
    """
    _check_idle(connection, version, place)
    operations = Operations(MigrationContext.configure(connection))
    for number in range(version + 1, target + 1):
        STEPS[number](operations)
    connection.execute(
        text("UPDATE meta SET value = :value WHERE key = 'schema_version'"), {"value": str(target)}
    )


def _check_idle(connection: Connection, version: int, place: str) -> None:
    """Refuse while a run has a living driver: it would go on to write as its version does."""
    clock = "extract(epoch FROM clock_timestamp())"
    if connection.dialect.name == "sqlite":
        clock = "(julianday('now') - 2440587.5) * 86400.0"
    query = f"SELECT name, owner, {clock} - heartbeat AS silence FROM runs WHERE owner IS NOT NULL"  # noqa: S608
    for row in connection.execute(text(query)):
        owner = Owner.of_json(row.owner)
        if owner is not None and owner.alive(float(row.silence)):
            raise StoreError(
                f'store {place}: its schema is version {version}, and run "{row.name}" is driven by {owner}; '
                "stop that run, then the store is brought to the present version"
            )


def _to_2(operations: Operations) -> None:
    """Requests, activity, the queue of a service, and checksums."""
    text_, integer, double = sa.Text, sa.Integer, sa.Double

    def column(name: str, kind: Any, *, nullable: bool = False, unique: bool = False) -> sa.Column[Any]:
        return sa.Column(name, kind, nullable=nullable, unique=unique or None)

    def of_run() -> sa.Column[Any]:
        return sa.Column("run_id", integer, sa.ForeignKey("runs.id"), primary_key=True)

    operations.create_index("events_kind", "events", ["run_id", "kind", "id"])
    operations.create_table(
        "requests", of_run(), column("epoch", integer), column("action", text_), column("at", double)
    )
    operations.create_table("activity", of_run(), column("at", double), column("data", text_))
    operations.create_table(
        "jobs",
        sa.Column("id", integer, primary_key=True),
        column("name", text_, unique=True),
        column("service", text_),
        column("key", text_, unique=True, nullable=True),
        *(column(name, text_) for name in ("digest", "config", "folder")),
        column("priority", integer),
        *(column(name, text_) for name in ("state", "outcome", "error", "options", "cancel")),
        *(column(name, integer) for name in ("epoch", "attempts", "restarts", "outcomes")),
        column("handle", text_),
        *(column(name, double) for name in ("queued", "updated")),
    )
    operations.create_index("jobs_state", "jobs", ["service", "state", "priority", "id"])
    operations.create_table(
        "exports",
        sa.Column("id", integer, primary_key=True),
        *(column(name, text_) for name in ("service", "run")),
        column("candidate", integer, nullable=True),
        *(column(name, text_) for name in ("state", "path", "error")),
        *(column(name, double) for name in ("created", "updated")),
    )
    operations.create_index("exports_run", "exports", ["run", "id"])
    _seal_all(operations.get_bind())


def _seal_all(connection: Connection) -> None:
    """Give every text of version 1 its checksum."""
    for table, keys, column, beside in (
        ("runs", ["id"], "config", ()),
        ("runs", ["id"], "facts", ()),
        ("runs", ["id"], "error", ()),
        ("candidates", ["run_id", "number"], "genome", ()),
        ("candidates", ["run_id", "number"], "recipe", _BESIDE_RECIPE),
        ("outcomes", _OUTCOME, "record", ("candidate", "documents", "fitness")),
        ("document_sets", ["run_id", "key"], "ids", ()),
        ("events", ["run_id", "id"], "data", ()),
    ):
        for row in _rows_of(connection, table, keys, column, beside):
            if row[column] is not None:
                sealed = _sealed(row[column], tuple(row[name] for name in beside))
                _change(connection, table, keys, row, {column: sealed})
    for row in _rows_of(connection, "outcomes", _OUTCOME, "document_values", ()):
        _change(connection, "outcomes", _OUTCOME, row, {"document_values": _squeezed(row["document_values"])})
    for row in _rows_of(
        connection, "snapshots", ["run_id", "sequence"], "state", ("asked", "told", "sha256")
    ):
        state = bytes(row["state"])
        if hashlib.sha256(b"%d %d " % (row["asked"], row["told"]) + state).hexdigest() != row["sha256"]:
            continue  # damaged before; who reads it says so
        state = _squeezed(state)
        sha256 = hashlib.sha256(b"%d %d " % (row["asked"], row["told"]) + state).hexdigest()
        _change(connection, "snapshots", ["run_id", "sequence"], row, {"state": state, "sha256": sha256})


_OUTCOME = ["run_id", "candidate", "documents"]
_BESIDE_RECIPE = ("number", "origin", "generation", "idx", "told_before", "digest", "genome")


def _rows_of(
    connection: Connection, table: str, keys: Sequence[str], column: str, beside: Sequence[str]
) -> Sequence[RowMapping]:
    names = ", ".join(dict.fromkeys((*keys, column, *beside)))
    return connection.execute(text(f"SELECT {names} FROM {table}")).mappings().all()  # noqa: S608


def _change(
    connection: Connection, table: str, keys: Sequence[str], row: RowMapping, values: Mapping[str, Any]
) -> None:
    changes = ", ".join(f"{name} = :new_{name}" for name in values)
    where = " AND ".join(f"{name} = :{name}" for name in keys)
    given = {f"new_{name}": value for name, value in values.items()} | {name: row[name] for name in keys}
    connection.execute(text(f"UPDATE {table} SET {changes} WHERE {where}"), given)  # noqa: S608


def _sealed(plain: str, beside: tuple[object, ...] = ()) -> str:
    checksum = zlib.crc32(repr((plain, *beside)).encode("utf-8", "surrogatepass"))
    return f"{plain}\n#{checksum:08x}"


def _squeezed(blob: bytes) -> bytes:
    try:
        return zlib.compress(_sealed(zlib.decompress(bytes(blob)).decode()).encode(), 1)
    except (zlib.error, UnicodeDecodeError):
        return bytes(blob)  # damaged before; who reads it says so


STEPS: Mapping[int, Step] = {2: _to_2}
"""Version to the step that leads there from the one before."""
