"""The tables of a store, and how data goes into their columns and comes back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from evomerge.errors import StoreError

SCHEMA = 2
"""Version of the tables below; an older store is brought to it when it is opened, a newer one is refused."""

METADATA = MetaData()

META = Table("meta", METADATA, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))

RUNS = Table(
    "runs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("status", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("owner", Text),
    Column("heartbeat", Double, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("error", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("facts", Text, nullable=False),
)

CANDIDATES = Table(
    "candidates",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("origin", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("idx", Integer),
    Column("told_before", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("genome", Text),
    Column("recipe", Text, nullable=False),
    Index("candidates_digest", "run_id", "digest", "number"),
)

# `record` is the whole outcome but its per-document values. Status and score stand beside it for SQL;
# they are not read back, because SQLite turns a stored -0.0 into 0.0.
OUTCOMES = Table(
    "outcomes",
    METADATA,
    Column("run_id", Integer, primary_key=True),
    Column("candidate", Integer, primary_key=True),
    Column("documents", Text, primary_key=True),
    Column("split", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("score", Double),
    Column("fitness", Text, nullable=False),
    Column("told", Integer),
    Column("epoch", Integer, nullable=False),
    Column("recorded", Double, nullable=False),
    Column("record", Text, nullable=False),
    Column("document_values", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run_id", "candidate"], ["candidates.run_id", "candidates.number"]),
    Index("outcomes_told", "run_id", "told", unique=True),
    Index("outcomes_best", "run_id", "split", "status", "score", "candidate"),
    Index("outcomes_documents", "run_id", "documents", "candidate"),
)

# Counting rows costs more with every row; this keeps progress flat.
TALLIES = Table(
    "tallies",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("split", Text, primary_key=True),
    Column("status", Text, primary_key=True),
    Column("number", Integer, nullable=False),
)

DOCUMENT_SETS = Table(
    "document_sets",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("ids", Text, nullable=False),
)

SNAPSHOTS = Table(
    "snapshots",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("asked", Integer, nullable=False),
    Column("told", Integer, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("state", LargeBinary, nullable=False),
)

EVENTS = Table(
    "events",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("id", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("data", Text, nullable=False),
    Index("events_kind", "run_id", "kind", "id"),
)

# What anybody asks of the driver that has the run at this epoch.
REQUESTS = Table(
    "requests",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("action", Text, nullable=False),
    Column("at", Double, nullable=False),
)

# What the workers do at the moment: overwritten, no history.
ACTIVITY = Table(
    "activity",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.id), primary_key=True),
    Column("at", Double, nullable=False),
    Column("data", Text, nullable=False),
)

# The queue of a service. A job has the name of its run, which does not exist before its driver starts.
JOBS = Table(
    "jobs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("service", Text, nullable=False),
    Column("key", Text, unique=True),
    Column("digest", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("folder", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("options", Text, nullable=False),
    Column("cancel", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("outcomes", Integer, nullable=False),
    Column("handle", Text, nullable=False),
    Column("queued", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Index("jobs_state", "service", "state", "priority", "id"),
)

EXPORTS = Table(
    "exports",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("service", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("candidate", Integer),
    Column("state", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Index("exports_run", "run", "id"),
)


class now(FunctionElement[float]):
    """The database's own clock in Unix seconds (UTC), so that hosts with wrong clocks agree."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(_element: now, _compiler: Any, **_kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgres_now(_element: now, _compiler: Any, **_kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


@contextmanager
def intact(what: str) -> Iterator[None]:
    """Turn what a value of a wrong kind causes inside the block into a StoreError that names `what`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{what} is damaged in the store: {error}; restore the store from a copy") from None


def pack(data: Any, what: str, *beside: object) -> str:
    """Return `data` as JSON text and a checksum; floats come back from `unpack` bit for bit.

    Args:
        data: What goes into the column.
        what: Its name in messages.
        beside: Values of other columns of the row that the checksum covers too.

    Raises:
        StoreError: `data` is no JSON data, or holds a number that is not finite. Names `what`.
    """
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        return f"{text}{_MARK}{_checksum(text, beside)}"
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{what} cannot be stored: {error}; expected JSON data with finite numbers"
        ) from None


def unpack(text: str, what: str, *beside: object) -> Any:
    """Return what `pack` wrote.

    Raises:
        StoreError: The text, or what stood beside it, is damaged. Names `what`.
    """
    try:
        plain, _, checksum = str(text).rpartition(_MARK)
        if checksum != _checksum(plain, beside):
            raise ValueError("its checksum differs")
        return json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what} is damaged in the store: {error}; restore the store from a copy") from None


_MARK = "\n#"


def _checksum(text: str, beside: tuple[object, ...]) -> str:
    return f"{zlib.crc32(repr((text, *beside)).encode('utf-8', 'surrogatepass')):08x}"


def squeeze(data: Any, what: str) -> bytes:
    """Return `data` as compressed JSON, see `pack`."""
    return zlib.compress(pack(data, what).encode(), 1)


def unsqueeze(blob: bytes, what: str) -> Any:
    """Return what `squeeze` wrote, see `unpack`."""
    try:
        text = zlib.decompress(blob).decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise StoreError(f"{what} is damaged in the store: {error}; restore the store from a copy") from None
    return unpack(text, what)
