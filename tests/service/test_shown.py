"""A large run is summed up once for all who ask, and never so late that an end is missed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import MissingError
from evomerge.report.overview import shown
from evomerge.service import shown as module
from evomerge.service.shown import ShownRuns
from evomerge.store import Run, Store
from tests.contracts.store import make_candidate, make_outcome


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "runs.db") as store:
        yield store


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were summed up."""
    names: list[str] = []

    def counted(store: Store, name: str) -> dict[str, Any]:
        names.append(name)
        return shown(store, name)

    monkeypatch.setattr(module, "shown", counted)
    return names


def begun(store: Store) -> Run:
    run = store.create_run("r", {"budget": {}}, {})
    run.add_candidate(make_candidate(0), 0)
    return run


def test_many_who_ask_at_once_get_one_answer(store: Store, made: list[str]) -> None:
    begun(store)
    runs = ShownRuns(store)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: runs.get("r"), range(8)))
    assert made == ["r"]
    assert all(one is found[0] for one in found)


def test_what_changes_is_summed_up_again(
    store: Store, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    run, runs = begun(store), ShownRuns(store)
    assert runs.get("r")["outcomes"] == 0
    run.add_outcome(make_outcome(0), "f")
    assert runs.get("r")["outcomes"] == 1
    assert len(made) == 2
    run.heartbeat()
    runs.get("r")
    assert len(made) == 2


def test_an_end_is_shown_at_once_however_long_the_patience(
    store: Store, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1e9)
    run, runs = begun(store), ShownRuns(store)
    runs.get("r")
    run.add_outcome(make_outcome(0), "f")
    assert runs.get("r")["outcomes"] == 0
    run.release("finished")
    assert (runs.get("r")["outcomes"], runs.get("r")["status"]) == (1, "finished")
    assert len(made) == 2


def test_an_unknown_run_is_an_error_each_time(store: Store) -> None:
    runs = ShownRuns(store)
    for _ in range(2):
        with pytest.raises(MissingError):
            runs.get("nobody")
