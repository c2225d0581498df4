"""A store: a database that holds runs."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, cast

from sqlalchemy import Connection, Engine, insert, select, update

from evomerge.checkpoints.whole import made_folder, partial_of, remove, remove_stale, sync
from evomerge.errors import ConflictError, MissingError, StoreError, nearest
from evomerge.faults import reached
from evomerge.store.connect import (
    check_place,
    insist,
    locate,
    lock,
    make_engine,
    prepare,
    shown,
    translated,
)
from evomerge.store.owner import LEASE_SECONDS, Owner
from evomerge.store.run import Run
from evomerge.store.tables import RUNS, intact, now, pack
from evomerge.store.view import RUN_ROW, RunView

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Store:
    """An open store. Threads may share it; every process opens its own, forked ones too.

    Attributes:
        location: Where it is, for messages: the path, or the URL without password.
    """

    def __init__(self, engine: Engine) -> None:
        """Use `open`."""
        self.location = shown(engine.url)
        self._engine = engine
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._missing: Path | None = None
        if engine.dialect.name == "sqlite":
            self._reader = engine
        else:
            # Several SELECTs of one transaction see one moment, as they do in SQLite.
            self._reader = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        self._writer = engine.execution_options(evomerge_writing=True)

    @classmethod
    def open(cls, url: str | Path, *, create: bool = True) -> Store:
        """Open a store.

        Args:
            url: `sqlite:///PATH` or a plain path (SQLite), or `postgresql://USER:PASSWORD@HOST/DATABASE`.
            create: Make the tables where there is nothing yet; the directory or database must exist.

        Raises:
            StoreError: It cannot be reached or written, is damaged, of another program or version, lies on
                a network filesystem, or does not exist and `create` is False.
        """
        target = locate(url)
        engine = make_engine(target)
        store = cls(engine)
        try:
            with translated(target):
                prepare(store._reader, store._writer, create=create)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def planned(cls, url: str | Path) -> Store:
        """Open a store that its first run makes, if it is a SQLite file that is not there yet.

        So a run that cannot begin leaves no empty store behind, and no store that others use has to be
        removed. Folders of the file are made with it.

        Raises:
            StoreError: As `open`; or a file cannot be made there.
        """
        target = locate(url)
        file = Path(str(target.database)) if target.get_backend_name() == "sqlite" else None
        if file is None or os.path.lexists(file):
            return cls.open(url)
        check_place(file)
        store = cls(make_engine(target))
        store._missing = file
        return store

    def _make(self) -> None:
        """Make what was planned; another process may have done it."""
        if self._missing is not None:
            with translated(self._engine.url), made_folder(self._missing.parent, error=StoreError):
                prepare(self._reader, self._writer, create=True)
            self._missing = None

    def _make_with(self, name: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
        """Make what was planned with a first run in it, whole or not at all.

        It is written beside its place and linked there, which fails if another process was quicker: then,
        and where there are no links, nothing is made and False is returned.
        """
        path = self._missing
        if path is None or path.exists():
            return False
        with made_folder(path.parent, error=StoreError):
            remove_stale(path)
            partial = partial_of(path)
            try:
                with made_folder(partial, error=StoreError), Store.open(partial / path.name) as store:
                    store.create_run(name, config, facts)
                if len(list(partial.iterdir())) > 1:
                    raise StoreError(f"store {path}: its log cannot be written back; free some space")
                try:
                    os.link(partial / path.name, path)
                except OSError:
                    return False
                with suppress(OSError):
                    sync(path.parent)
            except StoreError as problem:
                raise StoreError(str(problem).replace(str(partial / path.name), str(path))) from problem
            finally:
                remove(partial)
        return True

    def create_run(self, name: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Run:
        """Begin a run and become its driver.

        Args:
            name: 1 to 100 letters, digits, dots, underscores and hyphens; a letter or digit first.
            config: What the user configured, JSON data.
            facts: What is frozen from now on, such as fingerprints and versions, JSON data.

        Raises:
            StoreError: The name is taken or not allowed, or the data is no finite JSON.
        """
        if not _NAME.fullmatch(name):
            raise StoreError(
                f"run name {name[:120]!r} is not allowed; expected 1 to 100 letters, digits, dots,"
                " underscores or hyphens, a letter or digit first"
            )
        row = {
            "name": name,
            "status": "running",
            "epoch": 1,
            "owner": Owner.here().to_json(),
            "error": pack("", "the error"),
            "config": pack(dict(config), f'run "{name}": its config'),
            "facts": pack(dict(facts), f'run "{name}": its facts'),
        }
        made = self._make_with(name, config, facts)
        self._make()
        if made:
            with self.reading() as connection:
                return Run(self, connection.execute(RUN_ROW.where(RUNS.c.name == name)).one())
        with self.writing() as connection:
            self.lock(connection)
            self.check_free(connection, name)
            connection.execute(insert(RUNS).values(**row, heartbeat=now(), created=now(), updated=now()))
            reached("run_written")
            return Run(self, connection.execute(RUN_ROW.where(RUNS.c.name == name)).one())

    def take_run(self, name: str) -> Run:
        """Become the driver of a run; handles of earlier drivers can write no more.

        A driver counts as alive while its process lives; on another host, for 60 s after its last write.
        Within one process, taking a run again is allowed.

        Raises:
            StoreError: There is no such run, or another driver of it is alive.
        """
        with self.writing() as connection:
            row = connection.execute(RUN_ROW.where(RUNS.c.name == name).with_for_update()).one_or_none()
            if row is None:
                raise self._unknown(connection, name)
            with intact(f'run "{name}": its owner'):
                here, owner = Owner.here(), Owner.of_json(row.owner)
            if owner is not None and owner != here and owner.alive(row.silence):
                raise StoreError(
                    f'run "{name}" is driven by {owner}, which wrote {max(row.silence, 0.0):.0f} s ago;'
                    f" stop it first (on another host it counts as alive for {LEASE_SECONDS:.0f} s)"
                )
            connection.execute(
                update(RUNS)
                .where(RUNS.c.id == row.id)
                .values(
                    epoch=row.epoch + 1,
                    owner=here.to_json(),
                    status="running",
                    error=pack("", "the error"),
                    heartbeat=now(),
                    updated=now(),
                )
            )
            return Run(self, connection.execute(RUN_ROW.where(RUNS.c.id == row.id)).one())

    def run(self, name: str) -> RunView:
        """Return a run to read; StoreError if there is none of that name."""

        def fetch() -> RunView:
            with self.reading() as connection:
                row = connection.execute(RUN_ROW.where(RUNS.c.name == name)).one_or_none()
                if row is None:
                    raise self._unknown(connection, name)
            return RunView(self, row)

        return cast(RunView, insist(fetch))

    def find(self, name: str) -> RunView | None:
        """Return a run to read; None if there is none of that name."""
        if self._missing is not None and not self._missing.exists():
            return None
        with self.reading() as connection:
            row = connection.execute(RUN_ROW.where(RUNS.c.name == name)).one_or_none()
        return None if row is None else RunView(self, row)

    def runs(self) -> list[RunView]:
        """Return all runs to read, oldest first."""
        with self.reading() as connection:
            rows = connection.execute(RUN_ROW.order_by(RUNS.c.id)).all()
        return [RunView(self, row) for row in rows]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that reads, as of one moment; database errors become a StoreError."""
        self._check_process()
        if self._missing is not None:
            if not self._missing.exists():
                raise MissingError(f"store {self.location}: it has no runs yet")
            self._make()
        with translated(self._engine.url), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that writes, committed at the end; database errors become a StoreError."""
        self._check_process()
        with self._turn, translated(self._engine.url), self._writer.begin() as connection:
            yield connection

    def lock(self, connection: Connection) -> None:
        """Let one writing transaction at a time pass here, until it ends."""
        lock(connection)

    def check_free(self, connection: Connection, name: str) -> None:
        """Raise ConflictError if there is a run of that name."""
        if connection.execute(select(RUNS.c.id).where(RUNS.c.name == name)).first():
            raise ConflictError(
                f'run "{name}" exists in store {self.location}: evomerge resume {name}, or give another name'
            )

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise StoreError(f"store {self.location}: it was opened before a fork; open it in this process")

    def _unknown(self, connection: Connection, name: str) -> StoreError:
        names = connection.execute(select(RUNS.c.name)).scalars().all()
        return MissingError(f'there is no run "{name}" in store {self.location}{nearest(name, names)}')
