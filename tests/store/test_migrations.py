"""Stores of older versions are brought to the present one, and their runs go on."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, create_engine, insert, text

from evomerge.errors import StoreError
from evomerge.store import Store
from evomerge.store.connect import locate, make_engine
from evomerge.store.migrations import STEPS
from evomerge.store.owner import Owner
from evomerge.store.tables import METADATA, SCHEMA
from tests.e2e.world import evomerge, make_world
from tests.postgres import fresh_schema

DUMP = Path(__file__).parents[1] / "data" / "store_v1.sql"
"""What the first version of the store held of the run `old`, killed after 11 outcomes."""


def old_sqlite(folder: Path) -> str:
    """Write the old store into a folder as it was; return its path."""
    path = folder / "old.db"
    with sqlite3.connect(path) as database:
        database.executescript(DUMP.read_text("utf-8").replace("{WORLD}", str(folder)))
    return str(path)


def old_postgres(folder: Path, server: str) -> str:
    """Copy the old store into a new schema of a PostgreSQL server; return its URL."""
    tables = MetaData()
    source = create_engine(f"sqlite:///{old_sqlite(folder)}")
    tables.reflect(source)
    for table in tables.tables.values():
        for column in table.columns:
            column.type = column.type.as_generic()
    url = fresh_schema(server)
    target = make_engine(locate(url))
    with source.connect() as old, target.begin() as new:
        tables.create_all(new)
        for table in tables.sorted_tables:
            rows = [row._asdict() for row in old.execute(table.select())]
            if rows:
                new.execute(insert(table), rows)
    source.dispose()
    target.dispose()
    return url


def differences(url: str) -> list[object]:
    """Return in what the tables differ from `tables.py`, by alembic's comparison."""
    engine = make_engine(locate(url))
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), METADATA)
    engine.dispose()
    return list(found)


def test_there_is_a_step_to_every_version() -> None:
    assert list(STEPS) == list(range(2, SCHEMA + 1))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return old_sqlite(tmp_path)
    return old_postgres(tmp_path, request.getfixturevalue("postgres"))


def test_an_old_store_gets_the_present_tables_and_keeps_its_run(url: str) -> None:
    assert differences(url)
    with Store.open(url, create=False) as store:
        run = store.run("old")
        assert (run.status, run.owner_alive, len(run.candidates()), len(run.outcomes())) == (
            "running",
            False,
            11,
            11,
        )
        assert run.counts().best_score == max(o.score for o in run.outcomes())  # type: ignore[type-var]
        taken = store.take_run("old")
        taken.set_activity({"phase": "search"})
        taken.add_event("said", {})
        assert [event.kind for event in taken.events(kind="said")] == ["said"]
    assert differences(url) == []
    Store.open(url).close()


def test_an_old_store_with_a_living_driver_is_left_alone(url: str) -> None:
    engine = make_engine(locate(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE runs SET owner = :owner"), {"owner": Owner.here().to_json()})
    engine.dispose()
    with pytest.raises(StoreError, match=r'is version 1, and run "old" is driven by .*; stop that run'):
        Store.open(url)
    assert differences(url)


def test_a_step_that_fails_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(operations: object) -> None:
        STEPS_BEFORE[2](operations)  # type: ignore[arg-type]
        raise RuntimeError("power cut")

    monkeypatch.setattr("evomerge.store.migrations.STEPS", {2: broken})
    with pytest.raises(RuntimeError, match="power cut"):
        Store.open(url)
    assert differences(url)
    monkeypatch.undo()
    Store.open(url).close()
    assert differences(url) == []


STEPS_BEFORE = dict(STEPS)


def test_a_run_begun_by_the_first_version_goes_on_to_its_end(url: str, tmp_path: Path) -> None:
    make_world(tmp_path)
    with sqlite3.connect(old_sqlite(tmp_path / "base")) as database:
        before = database.execute("SELECT candidate, score FROM outcomes ORDER BY candidate").fetchall()
    done = evomerge(tmp_path, "resume", "old", "--store", url)
    assert done.returncode == 0, done.stderr
    with Store.open(url) as store:
        run = store.run("old")
        assert (run.status, run.epoch) == ("finished", 2)
        outcomes = run.outcomes("search")
        assert [(o.candidate, o.score) for o in outcomes][:11] == before
        assert len([c for c in run.candidates() if c.origin == "optimizer"]) == 12
        assert {o.documents for o in run.outcomes()} == {"search", "select", "test"}
