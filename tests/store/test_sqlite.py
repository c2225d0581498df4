"""What can happen to a SQLite file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from evomerge.errors import ConflictError, MissingError, StoreError
from evomerge.store import Store, connect
from tests.store.processes import GENERATION, advance, make_candidate, make_outcome


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        yield store


def refused(path: Path | str, *, create: bool = True) -> str:
    """Return the message with which opening is refused; it is one line and names the path."""
    with pytest.raises(StoreError) as caught:
        Store.open(path, create=create)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_settings(store: Store) -> None:
    with store.writing() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_a_plain_path_and_a_url_are_the_same(store: Store, path: Path) -> None:
    store.create_run("r", {}, {})
    for url in (path, str(path), f"sqlite:///{path}"):
        with Store.open(url, create=False) as other:
            assert other.location == str(path)
            assert [run.name for run in other.runs()] == ["r"]


def test_a_relative_path_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.open("odd ?#%20 name.db") as store:
        store._engine.dispose()
        monkeypatch.chdir("/")
        store.create_run("r", {}, {})
    assert (tmp_path / "odd ?#%20 name.db").is_file()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    assert "it is empty" in refused(path, create=False)
    with Store.open(path) as store:
        store.create_run("r", {}, {})


@pytest.mark.parametrize("content", [b"x", b"garbage " * 1000, b"SQLite format 3\x00", b"\x00" * 4096])
def test_garbage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for create in (True, False):
        assert "this is no SQLite file: give another path" in refused(path, create=create)
    assert path.read_bytes() == content


def test_a_truncated_file_is_refused(path: Path) -> None:
    with Store.open(path) as store:
        run = store.create_run("r", {}, {})
        for _ in range(3):
            advance(run, [])
    whole = path.read_bytes()
    for size in [1, 99, 511, 512, 4095, *range(4096, len(whole), 4096)]:
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError) as caught:
            read_all(path)
        assert "\n" not in str(caught.value)


def read_all(path: Path) -> None:
    with Store.open(path) as store:
        view = store.run("r")
        view.candidates()
        view.outcomes()
        view.log()


def test_a_torn_log_loses_only_its_tail(store: Store, path: Path, tmp_path: Path) -> None:
    run = store.create_run("r", {}, {})
    with store.writing() as connection:
        assert connection.exec_driver_sql("PRAGMA wal_autocheckpoint=0").scalar_one() == 0
    advance(run, [])
    log = Path(f"{path}-wal").read_bytes()
    seen = set()
    copy = tmp_path / "copy.db"
    for end in range(32 + 24 + 4096, len(log), 24 + 4096):
        for content in (log[: end - 1], log[:end] + bytes([log[end] ^ 1]) + log[end + 1 :]):
            shutil.copy(path, copy)
            Path(f"{copy}-wal").write_bytes(content)
            Path(f"{copy}-shm").unlink(missing_ok=True)
            with Store.open(copy) as other:
                view = next(iter(other.runs()), None)
                told = len(view.log().told) if view else 0
                snapshot = view.latest_snapshot() if view else None
                assert (snapshot.told if snapshot else 0) == told
                assert told % GENERATION == 0
                candidates = view.candidates() if view else []
                assert candidates == [make_candidate(number) for number in range(len(candidates))]
                seen.add(len(candidates))
                with other.reading() as connection:
                    check = connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
                assert check == "ok"
    assert seen == set(range(5))


def test_a_file_of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE studies (a)")
    other.close()
    before = path.read_bytes()
    assert "it holds tables of another program (studies)" in refused(path)
    assert path.read_bytes() == before


def test_bad_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "does not exist; make it first" in refused(tmp_path / "no" / "store.db")
    assert "does not exist; make it first" in refused(file / "store.db")
    assert "it is a directory; give a file" in refused(tmp_path)
    assert "there is no such file" in refused(tmp_path / "store.db", create=False)
    assert "give another path" in refused(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "it is no regular file" in refused(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that even root cannot write")
def test_an_unwritable_directory() -> None:
    assert "writable" in refused("/proc/self/store.db")


def test_a_network_filesystem(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("nfs4", "lustre", "fuse.sshfs", "smb3"):
        monkeypatch.setattr(connect, "_filesystem", lambda _directory, kind=kind: kind)
        message = refused(path)
        assert f"not safe on a network filesystem ({kind}); put it on a local disk" in message
        assert not path.exists()


def test_the_filesystem_is_found(tmp_path: Path) -> None:
    assert connect._filesystem(Path("/proc/self")) == "proc"
    assert connect._filesystem(tmp_path) not in ("", "proc")


def test_a_lock_held_too_long(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.create_run("r", {}, {})
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(connect, "BUSY_SECONDS", 0.05)
    with Store.open(path, create=False) as impatient:
        with pytest.raises(StoreError, match="database is locked; another process has held it"):
            impatient.take_run("r")
        assert impatient.run("r").epoch == 1
    holder.execute("ROLLBACK")
    holder.close()
    run.heartbeat()


def test_a_full_disk_at_any_write(store: Store, path: Path) -> None:
    run = store.create_run("r", {}, {})

    def limit(connection: sqlite3.Connection, *_rest: object) -> None:
        connection.execute(f"PRAGMA max_page_count={most}")

    for room in (0, 1, 2, 3, 5):
        with store.reading() as connection:
            most = connection.exec_driver_sql("PRAGMA page_count").scalar_one() + room
        event.listen(store._engine, "checkout", limit)
        with pytest.raises(StoreError, match=r"disk is full; free some space, then resume"):  # noqa: PT012
            for _ in range(100):
                advance(run, [])
        event.remove(store._engine, "checkout", limit)
        with store.writing() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        advance(run, [])
        numbers = range(run.counts().candidates)
        assert run.candidates() == [make_candidate(number) for number in numbers]
        assert run.outcomes() == [make_outcome(number) for number in numbers]
        assert run.log().told == tuple(make_outcome(number) for number in numbers)


def test_a_file_that_may_grow_no_more(path: Path) -> None:
    program = """
import resource, signal, sys
from evomerge.errors import ConflictError, MissingError, StoreError
from evomerge.store import Store
from tests.store.processes import advance
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
run = Store.open(sys.argv[1]).create_run("r", {}, {})
said = []
try:
    while True:
        advance(run, said)
except StoreError as error:
    print(len([line for line in said if line.startswith("outcome")]), error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    outcomes, _, message = done.stdout.partition(" ")
    assert "disk" in message
    assert message.count("\n") == 1
    with Store.open(path) as store:
        assert len(store.run("r").outcomes()) >= int(outcomes) > 3
        advance(store.take_run("r"), [])


def test_nothing_reads_whole_tables(store: Store) -> None:
    run = store.create_run("r", {}, {})
    plans: list[str] = []

    def explain(
        connection: object, cursor: object, statement: str, parameters: object, *_rest: object
    ) -> None:
        raw = store._engine.raw_connection()
        many = isinstance(parameters, list)
        rows = raw.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters)
        plans.extend(f"{row[3]} <- {statement}" for row in rows.fetchall())
        raw.close()

    event.listen(store._engine, "before_cursor_execute", explain)
    advance(run, [])
    run.counts()
    run.find_outcome("d0", "f", "search")
    run.outcome(0, "search")
    run.outcomes("search")
    run.log(run.latest_snapshot())
    run.add_event("note", {})
    event.remove(store._engine, "before_cursor_execute", explain)
    assert len(plans) > 20
    scans = [plan for plan in plans if plan.startswith("SCAN") and "CONSTANT ROW" not in plan]
    assert not scans


def test_a_planned_store_is_made_by_its_first_run_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "below" / "store.db"
    with Store.planned(path) as store:
        assert store.find("r") is None
        with pytest.raises(MissingError, match="it has no runs yet"):
            store.run("r")
        assert list(tmp_path.iterdir()) == []
        store.create_run("r", {}, {})
        assert store.run("r").name == "r"
    with Store.open(path, create=False) as store:
        assert [run.name for run in store.runs()] == ["r"]


def test_a_planned_store_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond so many bytes, in a process of its own: as on a full disk."""
    code = (
        "import resource, sys\n"
        "from evomerge.errors import StoreError\nfrom evomerge.store import Store\n"
        "store = Store.planned(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "try:\n    store.create_run('r', {}, {})\nexcept StoreError as problem:\n    print(problem)\n"
    )
    path = tmp_path / "new" / "store.db"
    for size in (0, 4096, 1 << 15, 1 << 16, 1 << 20):
        done = subprocess.run(
            [sys.executable, "-c", code, path, str(size)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if size == 1 << 20:
            assert not done.stdout
            assert [file.name for file in path.parent.iterdir()] == ["store.db"]
        else:
            assert done.stdout.startswith(f"store {path}: "), done.stdout
            assert list(tmp_path.iterdir()) == [], size


def test_two_drivers_that_plan_one_store_both_have_their_runs(path: Path) -> None:
    with Store.planned(path) as one, Store.planned(path) as two:
        one.create_run("a", {}, {})
        assert two.find("a") is not None
        two.create_run("b", {}, {})
        with Store.planned(path) as three:
            assert [run.name for run in three.runs()] == ["a", "b"]
        with pytest.raises(ConflictError, match='run "a" exists'):
            two.create_run("a", {}, {})


def test_a_store_that_cannot_be_made_is_refused_when_planned_or_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file is no directory; give another path"):
        Store.planned(tmp_path / "file" / "below" / "store.db")
    with Store.planned(tmp_path / "new" / "below" / "store.db") as store:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "below").write_text("")
        with pytest.raises(StoreError, match=r"cannot be made \(File exists\)"):
            store.create_run("r", {}, {})
    assert (tmp_path / "new" / "below").read_text() == ""
