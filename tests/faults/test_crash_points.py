"""The process is killed at every named moment, and what was acknowledged by then is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evomerge.faults import CRASH_POINTS
from evomerge.store import Store
from tests.e2e.world import TASKS, write_config
from tests.faults.histories import repeated, whole_history
from tests.faults.killing import finished
from tests.faults.promises import Book
from tests.faults.runs import OPTIMIZERS, SPACES
from tests.nursery import Nursery

NAME = "points"

ACKNOWLEDGED = {
    "candidates": "candidate_recorded",
    "outcomes": "outcome_recorded",
    "told": "tell_recorded",
}
"""What the store counts, and the moment that follows one more of it."""

WRITTEN = ("file_written", "tensor_written", "export_written", "exported")

RESUMED = ("run_taken", "replayed")
"""Moments of a session that resumes."""

WITH_TASKS = ("documents_recorded",)
"""Moments of a run whose fitness is tasks."""


PLAIN = [name for name in CRASH_POINTS if name not in (*WRITTEN, *RESUMED, *WITH_TASKS)]


@dataclass(frozen=True)
class Whole:
    """The run that nobody disturbed: its history, the moments it passed, and the names of its files."""

    history: dict[str, Any]
    passed: Sequence[str]
    files: list[str]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(world: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    write_config(
        world,
        f"{NAME}.yaml",
        name=NAME,
        space=SPACES["parameter"],
        optimizer=OPTIMIZERS["cma_es"],
        budget={"evaluations": 8, "finalists": 2},
        baselines={"task_arithmetic": [0.3]},
        output={"report": True, "export": True},
    )
    folder = tmp_path_factory.mktemp("whole")
    done = run(nursery, folder, "any:0")
    return Whole(whole_history(folder / "store.db", NAME), done.passed, files(folder / NAME))


NO_OUTPUT = ("--set", "output.report=false", "--set", "output.export=false")


def run(nursery: Nursery, folder: Path, crash: str | None, *more: str) -> Any:
    """Run, or go on if there is something to go on with."""
    store = folder / "store.db"
    begun = bool(counted(store))
    arguments = ("resume", NAME) if begun else ("run", f"{NAME}.yaml")
    log = {"FITNESS_LOG": str(folder / "evaluations")}
    done = nursery.run(*arguments, *more, "--store", store, crash=crash, env=log)
    return done if crash and not crash.endswith(":0") else finished(done)


def counted(store: Path) -> dict[str, int]:
    """Return how much of each kind the store holds; nothing while there is no run."""
    if not store.exists():
        return {}
    with Store.open(store) as opened:
        if not opened.runs():
            return {}
        view = opened.run(NAME)
        return {
            "candidates": len(view.candidates()),
            "outcomes": len(view.outcomes(values=False)),
            "told": len(view.log().told),
        }


def check(nursery: Nursery, folder: Path, whole: Whole, moment: int, book: Book) -> None:
    """Die at a moment of the run, look at what is there, go on, and compare the end."""
    folder.mkdir()
    passed = whole.passed[:moment]
    name = passed[-1]
    # Report and model cost more than the run; who is killed before them can do without.
    more = () if name in WRITTEN else NO_OUTPUT
    assert run(nursery, folder, f"any:{moment}", *more).killed
    found = counted(folder / "store.db")
    expected = {kind: passed.count(after) for kind, after in ACKNOWLEDGED.items()}
    assert (found or dict.fromkeys(ACKNOWLEDGED, 0)) == expected, f"killed at {name}, moment {moment}"
    assert bool(found) == ("run_created" in passed)
    written = [one for one in files(folder / NAME) if ".partial-" not in one]
    assert written == [one for one in whole.files if is_written(one, passed)], f"killed at {name}"
    run(nursery, folder, None, *more)
    again = repeated(folder / "evaluations")
    if name in WRITTEN:
        book.report("all or nothing", kills=1)
        assert files(folder / NAME) == whole.files, f"killed at {name}"
    else:
        book.report("crash points", kills=1, repeated=again)
    assert again <= CRASH_POINTS[name].repeats, f"killed at {name}"
    assert whole_history(folder / "store.db", NAME) == whole.history, f"killed at {name}, moment {moment}"


def is_written(file: str, passed: Sequence[str]) -> bool:
    """Return whether a file has its name by then; the report is renamed after its moment, before the next."""
    if file == "report.html":
        return "file_written" in passed[:-1]
    return "exported" in passed


@pytest.mark.promise("crash points")
@pytest.mark.parametrize("name", PLAIN)
def test_killed_at_each_moment(name: str, whole: Whole, nursery: Nursery, tmp_path: Path, book: Book) -> None:
    assert name in whole.passed
    check(nursery, tmp_path / "once", whole, whole.passed.index(name) + 1, book)


@pytest.mark.promise("all or nothing")
@pytest.mark.parametrize("name", WRITTEN)
def test_killed_while_files_are_written(
    name: str, whole: Whole, nursery: Nursery, tmp_path: Path, book: Book, long: bool
) -> None:
    places = [place for place, passed in enumerate(whole.passed, 1) if passed == name]
    assert places
    for place in places if long else places[:1]:
        check(nursery, tmp_path / str(place), whole, place, book)


@pytest.mark.promise("crash points")
@pytest.mark.parametrize("name", RESUMED)
def test_killed_while_it_resumes(
    name: str, whole: Whole, nursery: Nursery, tmp_path: Path, book: Book
) -> None:
    assert run(nursery, tmp_path, "tell_recorded:5", *NO_OUTPUT).killed
    before = counted(tmp_path / "store.db")
    for _ in range(2):
        assert run(nursery, tmp_path, name, *NO_OUTPUT).killed
        assert counted(tmp_path / "store.db") == before
    run(nursery, tmp_path, None, *NO_OUTPUT)
    again = repeated(tmp_path / "evaluations")
    book.report("crash points", kills=3, repeated=again)
    assert again == 0
    assert whole_history(tmp_path / "store.db", NAME) == whole.history


@pytest.mark.promise("crash points")
def test_killed_when_documents_are_recorded(
    world: Path, nursery: Nursery, tmp_path: Path, book: Book, long: bool
) -> None:
    """Fresh documents for each generation: three sets at the start, one more for each generation."""
    sets = [f"documents_recorded:{number}" for number in range(1, 6)]
    write_config(
        world,
        "tasks.yaml",
        name="tasks",
        fitness={**TASKS, "resample": 10},
        budget={"evaluations": 8, "finalists": 2},
    )
    undisturbed, killed = tmp_path / "undisturbed.db", tmp_path / "killed.db"
    finished(nursery.run("run", "tasks.yaml", "--store", undisturbed))
    arguments = ("run", "tasks.yaml")
    for crash in sets if long else sets[3:4]:
        assert nursery.run(*arguments, "--store", killed, crash=crash).killed
        book.report("crash points", kills=1)
        arguments = ("resume", "tasks")
    finished(nursery.run(*arguments, "--store", killed))
    assert whole_history(killed, "tasks") == whole_history(undisturbed, "tasks")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.promise("crash points")
def test_killed_at_every_moment(whole: Whole, nursery: Nursery, tmp_path: Path, book: Book) -> None:
    for moment in range(1, len(whole.passed) + 1):
        check(nursery, tmp_path / str(moment), whole, moment, book)


def test_every_moment_of_the_table_comes(whole: Whole) -> None:
    assert set(whole.passed) | {*RESUMED, *WITH_TASKS} == set(CRASH_POINTS)


def test_an_unknown_moment_is_refused_in_one_line(nursery: Nursery) -> None:
    for wrong in ("tell_recordet:3", "asked:x"):
        done = nursery.run("runs", crash=wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("evomerge: EVOMERGE_CRASH_AT: ")
        assert done.stderr.count("\n") == 1
