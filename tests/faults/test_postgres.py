"""A PostgreSQL server that ends connections, crashes, comes back, or stays away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.histories import repeated, whole_history
from tests.faults.killing import finished, one_line
from tests.faults.promises import Book
from tests.nursery import Nursery
from tests.postgres import PrivatePostgres, fresh_schema

pytestmark = pytest.mark.postgres

NAME = "cma_es-parameter"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[PrivatePostgres, str]]:
    made = PrivatePostgres()
    with made as url:
        yield made, url


@pytest.fixture
def whole(undisturbed: Any) -> dict[str, Any]:
    history: dict[str, Any] = undisturbed.made("cma_es", "parameter")[1]
    return history


def end_connections(url: str, seconds: float) -> int:
    """End every other connection again and again; return how many were ended."""
    import psycopg

    ended, until = 0, time.monotonic() + seconds
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < until:
            rows = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND application_name = 'evomerge'"
            ).fetchall()
            ended += len(rows)
            time.sleep(0.02)
    return ended


@pytest.mark.promise("connection lost")
def test_connections_that_are_ended_again_and_again_change_nothing(
    server: tuple[PrivatePostgres, str], whole: dict[str, Any], nursery: Nursery, tmp_path: Path, book: Book
) -> None:
    url = server[1]
    store = fresh_schema(url)
    gate = tmp_path / "gate"
    gate.mkdir()
    log = {"FITNESS_LOG": str(tmp_path / "evaluations"), "FITNESS_SECONDS": "0.05"}
    pid = nursery.start("run", f"{NAME}.yaml", "--store", store, env={"FITNESS_GATE": f"{gate}:1", **log})
    while not (gate / "reached").exists():
        time.sleep(0.01)
    (gate / "open").touch()
    ended = end_connections(url, 1.5)
    done = finished(nursery.wait(pid))
    book.report("connection lost", connections_ended=ended, recover=done.seconds)
    assert ended > 5
    assert whole_history(store, NAME) == whole
    assert repeated(tmp_path / "evaluations") == 0


@pytest.mark.promise("connection lost")
def test_a_server_that_crashes_and_comes_back_is_waited_for(
    server: tuple[PrivatePostgres, str], whole: dict[str, Any], nursery: Nursery, tmp_path: Path, book: Book
) -> None:
    postgres, url = server
    store = fresh_schema(url)
    gate = tmp_path / "gate"
    gate.mkdir()
    pid = nursery.start("run", f"{NAME}.yaml", "--store", store, env={"FITNESS_GATE": f"{gate}:7"})
    while not (gate / "reached").exists():
        time.sleep(0.01)
    postgres.stop()
    (gate / "open").touch()
    time.sleep(1.0)
    began = time.monotonic()
    postgres.start()
    finished(nursery.wait(pid))
    book.report("connection lost", recover=time.monotonic() - began)
    assert whole_history(store, NAME) == whole


@pytest.mark.promise("connection lost")
def test_a_server_that_stays_away_stops_the_run_which_goes_on_later(
    server: tuple[PrivatePostgres, str], whole: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    postgres, url = server
    store = fresh_schema(url)
    gate = tmp_path / "gate"
    gate.mkdir()
    pid = nursery.start(
        "run",
        f"{NAME}.yaml",
        "--store",
        store,
        env={"FITNESS_GATE": f"{gate}:7"},
        constants={"evomerge.store.connect.AWAY_SECONDS": 0.5},
    )
    while not (gate / "reached").exists():
        time.sleep(0.01)
    postgres.stop()
    (gate / "open").touch()
    line = one_line(nursery.wait(pid))
    assert "start it, then resume" in line
    assert "evomerge@" in line
    postgres.start()
    finished(nursery.run("resume", NAME, "--store", store))
    assert whole_history(store, NAME) == whole
