"""From a URL to an engine with the right settings, and from database errors to one line."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from evomerge.checkpoints.whole import why_not_made
from evomerge.errors import StoreError
from evomerge.faults import reached
from evomerge.store.tables import META, METADATA, SCHEMA

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

BUSY_SECONDS = 30.0
"""How long a writer waits for another writer before it gives up."""

NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "afs", "sshfs")
"""How the types of such filesystems begin, after a `fuse.`."""

_LOCK = 0x65766F6D  # "evom": one advisory lock for what PostgreSQL does not serialise by itself

_SMALLEST_SQLITE = 512

_ADVICE = {
    "locked": f"another process has held it for over {BUSY_SECONDS:.0f} s: end that one, then resume",
    "busy": f"another process has held it for over {BUSY_SECONDS:.0f} s: end that one, then resume",
    "not a database": "this is no SQLite file: give another path",
    "utf-8": "the file is damaged: restore it from a copy",
    "malformed": "the file is damaged: restore it from a copy",
    "full": "free some space, then resume; what was acknowledged is kept",
    "no space": "free some space, then resume; what was acknowledged is kept",
    "i/o error": "check the disk, then resume",
    "readonly": "make the file and its directory writable",
    "unable to open": "make the file and its directory readable and writable",
    "connect": "check that the server runs, and host, port, user, password and database in the URL",
}


AWAY_SECONDS = 60.0
"""How long a server may be away in the middle of a run."""

_AWAY = ("08", "57P", "53300")
"""How the SQL states begin of a server that ends connections, starts, stops, or has no place left."""


class ConnectionLost(StoreError):
    """The connection to the server broke; what was being committed may be there or not."""


def _is_lost(error: Exception) -> bool:
    cause = error.orig if isinstance(error, DBAPIError) else None
    if cause is None or type(cause).__module__.partition(".")[0] != "psycopg":
        return False
    state = getattr(cause, "sqlstate", None)
    # Without a state the server did not answer at all.
    return isinstance(error, OperationalError) and (state is None or state.startswith(_AWAY))


def insist(work: Callable[[], Result], done: Callable[[], bool] = lambda: False) -> Result | None:
    """Do something with a store, again while its server is away.

    Args:
        work: What to do; one transaction.
        done: Says whether a lost transaction was committed all the same; then None is returned.

    Raises:
        StoreError: The server stayed away.
    """
    deadline, pause = 0.0, 0.05
    while True:
        try:
            return None if deadline and done() else work()
        except ConnectionLost as problem:
            moment = time.monotonic()
            if not deadline:
                deadline = moment + AWAY_SECONDS
                _log.warning("%s; trying again for %.0f s", problem, AWAY_SECONDS)
            if moment > deadline:
                away = f"the server was away for {AWAY_SECONDS:.0f} s: start it, then resume"
                raise StoreError(f"{problem}; {away}") from problem
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def locate(url: str | Path) -> URL:
    """Return the database that `url` means.

    Args:
        url: `sqlite:///PATH`, a plain path, or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`.

    Raises:
        StoreError: It is none of these. Never shows a password.
    """
    if isinstance(url, Path) or "://" not in url:
        return URL.create("sqlite", database=_absolute(str(url)))
    expected = "expected sqlite:///PATH, a path, or postgresql://USER@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreError(f"store: the URL cannot be read; {expected}") from None
    backend = parsed.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f'store: unknown kind "{backend}"; {expected}')
    if parsed.host or parsed.query:
        raise StoreError(f"store: a SQLite URL has three slashes and no options; {expected}")
    return URL.create("sqlite", database=_absolute(parsed.database or ""))


def _absolute(path: str) -> str:
    if not path or path == ":memory:":
        raise StoreError("store: a SQLite store needs a file; give a path such as runs.db")
    return str(Path(path).expanduser().absolute())


def shown(url: URL) -> str:
    """Return the URL for messages: without password and options, a path for SQLite."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn a database error inside the block into a StoreError of one line that names the store."""
    try:
        yield
    # SQLite quotes a damaged schema in its messages, whatever bytes that has.
    except (SQLAlchemyError, sqlite3.Error, UnicodeDecodeError) as error:
        kind = ConnectionLost if _is_lost(error) else StoreError
        raise kind(f"store {shown(url)}: {_one_line(error, url)}") from error


def _one_line(error: Exception, url: URL) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    line = " ".join(str(cause).split())[:300]
    for secret in (url.password, url.query.get("password")):
        line = line.replace(str(secret), "***") if secret else line
    advice = next((advice for word, advice in _ADVICE.items() if word in line.lower()), None)
    return f"{line}; {advice}" if advice else line


def make_engine(url: URL) -> Engine:
    """Return an engine for the database; connects to nothing.

    Raises:
        StoreError: The PostgreSQL driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    arguments = {
        "connect_timeout": 10,
        "application_name": "evomerge",
        "client_encoding": "utf8",
        # Prepared statements break behind a pooler that hands out connections by transaction.
        "prepare_threshold": None,
    }
    arguments = {key: value for key, value in arguments.items() if key not in url.query}
    try:
        return create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except ImportError:
        raise StoreError(
            f"store {shown(url)}: the PostgreSQL driver is missing; pip install 'evomerge[postgres]'"
        ) from None


def _set_up_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later is refused at once when another wrote in between.
    writing = connection.get_execution_options().get("evomerge_writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def prepare(reader: Engine, writer: Engine, *, create: bool) -> None:
    """Check the database, and make the tables where it is empty.

    Args:
        reader: Engine whose transactions only read.
        writer: Engine whose transactions write.
        create: Make a store that does not exist yet.

    Raises:
        StoreError: It is missing, foreign, of another version, or cannot be a store.
    """
    sqlite = reader.dialect.name == "sqlite"
    if sqlite:
        _check_file(Path(str(reader.url.database)), create=create)
    with reader.begin() as connection:
        version = _version(connection)
        if not version and not create:
            raise StoreError(f"store {shown(reader.url)}: it is empty; start a run in it first")
    if sqlite:
        _use_wal(reader)
    if version == SCHEMA:
        return
    with writer.begin() as connection:
        lock(connection)
        _upgrade(connection, _version(connection))


def _upgrade(connection: Connection, version: int) -> None:
    """Bring the tables from a version to the present one; 0: there are none yet."""
    if version == SCHEMA:
        return
    if version == 0:
        METADATA.create_all(connection)
        connection.execute(insert(META).values(key="schema_version", value=str(SCHEMA)))
        reached("tables_made")
        return
    from evomerge.store.migrations import upgrade  # alembic is loaded where it is needed only

    upgrade(connection, version, SCHEMA, shown(connection.engine.url))


def lock(connection: Connection) -> None:
    """Let one transaction at a time pass here, until it ends; SQLite's writers always do."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))


def _version(connection: Connection) -> int:
    """Return the tables' version, 0 if there are none; raise StoreError if others' or newer ones are."""
    place = shown(connection.engine.url)
    names = set(inspect(connection).get_table_names())
    if META.name not in names:
        foreign = names if connection.dialect.name == "sqlite" else names & METADATA.tables.keys()
        if foreign:
            listed = ", ".join(sorted(foreign)[:3])
            raise StoreError(f"store {place}: it holds tables of another program ({listed}); give another")
        return 0
    try:
        version = connection.execute(
            select(META.c.value).where(META.c.key == "schema_version")
        ).scalar_one_or_none()
    except DBAPIError:
        version = None
    if version is None or not version.isdecimal():
        raise StoreError(f'store {place}: its table "meta" is of another program; give another')
    if not 1 <= int(version) <= SCHEMA:
        raise StoreError(
            f"store {place}: its schema is version {version}, this evomerge reads version {SCHEMA};"
            " use the evomerge that wrote it, or another store"
        )
    return int(version)


def _check_file(path: Path, *, create: bool) -> None:
    """Refuse what SQLite would report in words that do not help."""
    try:
        if path.is_dir():
            raise StoreError(f"store {path}: it is a directory; give a file, such as {path / 'runs.db'}")
        if not path.parent.is_dir():
            raise StoreError(f"store {path}: the directory {path.parent} does not exist; make it first")
        if not path.exists():
            if not create:
                raise StoreError(f"store {path}: there is no such file; check the path")
            if not os.access(path.parent, os.W_OK):
                raise StoreError(f"store {path}: the directory {path.parent} is not writable")
        elif not path.is_file():
            raise StoreError(f"store {path}: it is no regular file; give another path")
        elif 0 < path.stat().st_size < _SMALLEST_SQLITE:
            # SQLite takes some of these for empty. The file is not opened to look closer: closing it would
            # drop the locks that this process holds on it through another Store.
            raise StoreError(f"store {path}: this is no SQLite file: give another path")
    except OSError as error:
        raise StoreError(f"store {path}: {error.strerror}; give another path") from None
    _check_local(path, path.parent)


def check_place(path: Path) -> None:
    """Refuse a path at which no SQLite file can be made; directories that are missing can be.

    Raises:
        StoreError: It lies below no writable directory, or on a network filesystem.
    """
    problem = why_not_made(path.parent)
    if problem:
        raise StoreError(f"store {path}: {problem}; give another path")
    _check_local(path, path.parent)


def _check_local(path: Path, directory: Path) -> None:
    kind = _filesystem(directory)
    if kind.removeprefix("fuse.").startswith(NETWORK_FILESYSTEMS):
        raise StoreError(
            f"store {path}: SQLite is not safe on a network filesystem ({kind});"
            " put it on a local disk, or give a postgresql:// URL"
        )


def _filesystem(directory: Path) -> str:
    """Return the type of the filesystem that holds the directory; empty if unknown."""
    directory = directory.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _use_wal(engine: Engine) -> None:
    """Switch the file to a write-ahead log, with which readers do not block the writer."""
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        mode = cursor.execute("PRAGMA journal_mode").fetchone()[0]
        deadline = time.monotonic() + BUSY_SECONDS
        while mode != "wal":
            # SQLite does not wait for others here, whatever its timeout.
            try:
                mode = cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
                continue
            if mode != "wal":
                raise StoreError(
                    f"store {shown(engine.url)}: its filesystem allows no write-ahead log;"
                    " put it on a local disk, or give a postgresql:// URL"
                )
    finally:
        raw.close()
