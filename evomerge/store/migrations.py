"""From the tables of an older version to the present ones, step by step.

Each step is written with alembic's operations and stays as it was released: it says what the tables were
then, and does not look at `tables.py`. A test holds the sum of all steps equal to `tables.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, text

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
    """Requests, activity, and the queue of a service."""
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


STEPS: Mapping[int, Step] = {2: _to_2}
"""Version to the step that leads there from the one before."""
