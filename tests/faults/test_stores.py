"""What happens to a run when its SQLite file is locked, damaged, or has no room."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import StoreError
from evomerge.seeding import stream
from evomerge.store import Store
from tests.faults.histories import lost, recorded, repeated, whole_history
from tests.faults.killing import finished, one_line
from tests.faults.promises import Book
from tests.nursery import Nursery
from tests.store.load import sql

NAME = "cma_es-parameter"
RUN = ("run", f"{NAME}.yaml")
RESUME = ("resume", NAME)

FRAME = 4096 + 24
"""Bytes that a page takes in SQLite's write-ahead log."""


@pytest.fixture(scope="module")
def whole(undisturbed: Any) -> dict[str, Any]:
    history: dict[str, Any] = undisturbed.made("cma_es", "parameter")[1]
    return history


@pytest.fixture(scope="module")
def half(whole: dict[str, Any], nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its middle, all in one file."""
    store = tmp_path_factory.mktemp("half") / "store.db"
    assert nursery.run(*RUN, "--store", store, crash="tell_recorded:6").killed
    Store.open(store).close()
    assert not Path(f"{store}-wal").exists()
    return store


@pytest.fixture
def store(half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(half, tmp_path / "store.db"))


# No room


@pytest.mark.promise("disk full")
@pytest.mark.timeout(3600)
def test_no_room_for_the_nth_page_stops_the_run_and_it_goes_on_later(
    whole: dict[str, Any], nursery: Nursery, tmp_path: Path, book: Book, long: bool
) -> None:
    """Long: for every n a run of its own. Short: one run that gets a few pages more in each session."""
    frames = range(0, 10_000) if long else range(9, 10_000, 36)
    arguments: tuple[str, ...] = RUN
    for n in frames:
        store = tmp_path / (f"{n}.db" if long else "store.db")
        log = tmp_path / "evaluations"
        known = recorded(store, NAME)
        limit = 33_000 + n * FRAME  # the index of the log takes 32 KiB from the start
        done = nursery.run(*arguments, "--store", store, file_bytes=limit, env={"FITNESS_LOG": str(log)})
        gone = lost(known, store, NAME)
        if done.returncode == 0:
            break
        line = one_line(done)
        assert "disk" in line
        assert "then resume" in line
        begun = NAME in names(store)
        if long:
            known = recorded(store, NAME)
            finished(
                nursery.run(*(RESUME if begun else RUN), "--store", store, env={"FITNESS_LOG": str(log)})
            )
            assert whole_history(store, NAME) == whole
            gone += lost(known, store, NAME)
        again = repeated(log)
        if long:
            log.unlink(missing_ok=True)
            store.unlink()
        else:
            arguments = RESUME if begun else RUN
        assert gone == 0
        assert not long or again <= 1
        book.report("disk full", lost=gone, stops=1, repeated=again if long else 0)
    else:
        raise AssertionError("it never had enough room")
    assert n > 100
    assert whole_history(store, NAME) == whole
    if not long:
        stops = len(range(9, n, 36))
        assert repeated(log) <= stops
        book.report("disk full", repeated=repeated(log))


def names(store: Path) -> list[str]:
    with Store.open(store) as opened:
        return [run.name for run in opened.runs()]


@pytest.mark.promise("disk full")
def test_a_model_or_report_that_does_not_fit_leaves_nothing(
    nursery: Nursery, world: Path, undisturbed: Any, tmp_path: Path, book: Book
) -> None:
    name = undisturbed.made("niches", "segments")[0]
    store = world / f"{name}.db"
    limit = (world / "one" / "model.safetensors").stat().st_size // 2
    commands: list[tuple[str, ...]] = [
        ("export", name, str(tmp_path / "out")),
        ("report", name, "--out", str(tmp_path / "report.html")),
        ("population", "export", name, str(tmp_path / "population.json")),
    ]
    # A reader of a database that nobody has open makes an index of its log, which needs room too.
    with contextlib.closing(sqlite3.connect(store)) as reader:
        reader.execute("SELECT * FROM runs").fetchall()
        for command in commands:
            few = 1000 if command[0] == "population" else limit
            line = one_line(nursery.run(*command, "--store", str(store), file_bytes=few))
            assert "File too large" in line
            assert list(tmp_path.iterdir()) == []
            book.report("disk full", stops=1)
            finished(nursery.run(*command, "--store", str(store)))
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "evomerge-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a filesystem")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.promise("disk full")
def test_a_full_filesystem_stops_the_run_and_it_goes_on_with_more_room(
    whole: dict[str, Any], nursery: Nursery, small_disk: Path, book: Book
) -> None:
    store = small_disk / "store.db"
    line = one_line(nursery.run(*RUN, "--store", store))
    assert "disk is full; free some space, then resume; what was acknowledged is kept" in line
    known = len((small_disk / "store.db").read_bytes())
    assert known > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finished(nursery.run(*(RESUME if NAME in names(store) else RUN), "--store", store))
    book.report("disk full", stops=1)
    assert whole_history(store, NAME) == whole


# Locked


@pytest.mark.promise("store locked")
def test_a_lock_is_waited_for_and_one_that_stays_stops_the_run(
    whole: dict[str, Any], nursery: Nursery, store: Path
) -> None:
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    patience = {"evomerge.store.connect.BUSY_SECONDS": 0.3}
    line = one_line(nursery.run(*RESUME, "--store", store, constants=patience))
    assert "database is locked; another process has held it" in line
    pid = nursery.start(*RESUME, "--store", str(store))
    time.sleep(1.0)
    holder.execute("ROLLBACK")
    holder.close()
    finished(nursery.wait(pid))
    assert whole_history(store, NAME) == whole


@pytest.mark.promise("store locked")
def test_a_lock_that_comes_in_the_middle_stops_the_run(
    whole: dict[str, Any], nursery: Nursery, store: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    patience = {"evomerge.store.connect.BUSY_SECONDS": 0.3}
    env = {"FITNESS_GATE": f"{gate}:2"}
    pid = nursery.start(*RESUME, "--store", str(store), constants=patience, env=env)
    while not (gate / "reached").exists():
        time.sleep(0.01)
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    (gate / "open").touch()
    assert "database is locked" in one_line(nursery.wait(pid))
    holder.close()
    finished(nursery.run(*RESUME, "--store", store))
    assert whole_history(store, NAME) == whole


# Damaged


@pytest.mark.promise("snapshot damaged")
@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damaged_snapshots_are_passed_over(
    damaged: int, whole: dict[str, Any], nursery: Nursery, store: Path
) -> None:
    with Store.open(store) as opened:
        run = opened.run(NAME)
        with opened.reading() as connection:
            text = "SELECT sequence, state FROM snapshots ORDER BY sequence DESC"
            rows = list(connection.exec_driver_sql(text))
        for sequence, state in rows[:damaged]:
            broken = bytes(state[:5]) + bytes([state[5] ^ 16]) + bytes(state[6:])
            sql(opened, "UPDATE snapshots SET state = :s WHERE sequence = :n", s=broken, n=sequence)
    finished(nursery.run(*RESUME, "--store", store))
    assert whole_history(store, NAME) == whole
    with Store.open(store) as opened:
        run = opened.run(NAME)
        found = [event.data["sequence"] for event in run.events() if event.kind == "snapshot_damaged"]
    assert found == [sequence for sequence, _ in rows[:damaged]]


def judged(
    nursery: Nursery, store: Path, whole: dict[str, Any], change: Callable[[bytes], bytes], half: Path
) -> str:
    """Resume from a changed file; return `refused`, `harmless` or `unnoticed`."""
    for file in store.parent.glob("store.db*"):
        file.unlink()
    store.write_bytes(change(half.read_bytes()))
    done = nursery.run(*RESUME, "--store", store)
    if done.returncode:
        one_line(done)
        return "refused"
    try:
        return "harmless" if whole_history(store, NAME) == whole else "unnoticed"
    except StoreError:  # in what the run did not have to read
        return "refused"


@pytest.mark.promise("store damaged")
@pytest.mark.timeout(3600)
def test_a_file_that_was_cut_off_is_refused_or_does_no_harm(
    whole: dict[str, Any], nursery: Nursery, half: Path, store: Path, book: Book, long: bool
) -> None:
    size = half.stat().st_size
    pages = range(0, size, 4096)
    sizes = (
        [place + more for place in pages for more in (0, 1, 2000)] if long else [0, 100, size // 2, size - 1]
    )
    for cut in sizes:
        verdict = judged(nursery, store, whole, lambda data, cut=cut: data[:cut], half)
        book.report("store damaged", **{verdict: 1})
        assert verdict != "unnoticed", f"cut off at {cut}"


@pytest.mark.promise("store damaged")
@pytest.mark.timeout(7200)
def test_a_flipped_bit_is_refused_or_does_no_harm(
    whole: dict[str, Any], nursery: Nursery, half: Path, store: Path, book: Book, long: bool
) -> None:
    draw = stream(0, "bits")
    size = half.stat().st_size
    for _ in range(500 if long else 12):
        place, bit = int(draw.integers(size)), int(draw.integers(8))

        def flipped(data: bytes, place: int = place, bit: int = bit) -> bytes:
            return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

        verdict = judged(nursery, store, whole, flipped, half)
        book.report("store damaged", bits_flipped=1, **{verdict: 1})
        assert verdict != "unnoticed", f"bit {bit} of byte {place}"
