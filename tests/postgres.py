"""A PostgreSQL server of our own for tests: `with PrivatePostgres() as url:`."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

_START_SECONDS = 60


class PrivatePostgres:
    """A server in a new directory of its own, on a Unix socket there; gone with everything at the end.

    Runs as another user when we are root, because PostgreSQL refuses root. Where there are no binaries,
    no such user or no driver, the test is skipped with the reason; with EVOMERGE_REQUIRE_POSTGRES=1 it fails.
    Data is not synced to disk.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._command: list[str] = []
        self._common: dict[str, Any] = {}

    def __enter__(self) -> str:
        initdb, postgres = _binary("initdb"), _binary("postgres")
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            _unavailable(f"psycopg is missing: {error}")
        account = _account()
        # Not below TMPDIR: the other user must be able to reach it, and a socket path has 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="evomerge-pg-", dir="/tmp"))
        try:
            if account is not None:
                os.chown(self._directory, account.pw_uid, account.pw_gid)
            self._start(initdb, postgres, account)
        except BaseException:
            self.__exit__()
            raise
        return f"postgresql://evomerge@/postgres?host={self._directory}"

    def _start(self, initdb: str, postgres: str, account: pwd.struct_passwd | None) -> None:
        home = str(self._directory)
        data = f"{home}/data"
        who = {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        common = {**who, "cwd": home, "env": {"PATH": os.environ["PATH"], "HOME": home, "LC_ALL": "C"}}
        made = subprocess.run(
            [initdb, "-D", data, "-U", "evomerge", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            capture_output=True,
            text=True,
            check=False,
            **common,
        )
        if made.returncode:
            _unavailable(f"initdb failed: {made.stderr.strip()[-500:]}")
        self._command = [postgres, "-D", data, *self._options(home)]
        self._common = common
        self._run()

    @staticmethod
    def _options(home: str) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": home,
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "16MB",
            "max_connections": "60",
        }
        return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]

    def _run(self) -> None:
        with open(f"{self._directory}/log", "ab") as log:
            self._server = subprocess.Popen(
                self._command, stdout=log, stderr=log, preexec_fn=_end_with_parent, **self._common
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        import psycopg

        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(host=str(self._directory), user="evomerge", dbname="postgres").close()
            except psycopg.OperationalError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    log = (self._directory / "log").read_text(errors="replace")
                    raise RuntimeError(f"PostgreSQL did not start: {log[-1000:]}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Stop the server as a crash would."""
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait(timeout=20)

    def start(self) -> None:
        """Start it again, over its data."""
        self._run()

    def __exit__(self, *_error: object) -> None:
        if self._server is not None and self._server.poll() is None:
            # At once, because the data is thrown away.
            for way in (signal.SIGQUIT, signal.SIGKILL):
                self._server.send_signal(way)
                try:
                    self._server.wait(timeout=20)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def fresh_schema(url: str) -> str:
    """Return the URL of a new, empty schema on the server of `url`: as good as a database, and cheaper."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{url}&options=-csearch_path%3D{name}"


def _binary(name: str) -> str:
    found = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))]
    path = next((path for path in found if path), None)
    return path or _unavailable(f"there is no {name} on PATH or in /usr/lib/postgresql")


def _account() -> pwd.struct_passwd | None:
    """Return the user to run the server as; None for ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return _unavailable("we are root, and there is no user postgres or nobody to run the server as")


def _unavailable(reason: str) -> None:
    if os.environ.get("EVOMERGE_REQUIRE_POSTGRES") == "1":
        raise RuntimeError(f"PostgreSQL is required: {reason}")
    pytest.skip(f"PostgreSQL: {reason}")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)
