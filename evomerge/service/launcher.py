"""How a driver process is started, found again and ended: the contract, and local processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import UserError

LOG = "driver.log"
SPEAKER = "evomerge: "
"""How a command begins a line about what the user can mend."""
KEPT_OUT = ("EVOMERGE_TOKEN", "EVOMERGE_TOKEN_FILE", "EVOMERGE_SERVER")
"""What a driver's environment has not got from the service's."""


def clean_environment() -> dict[str, str]:
    """Return the service's environment without what would lead back to it."""
    return {name: value for name, value in os.environ.items() if name not in KEPT_OUT}


@dataclass(frozen=True, slots=True)
class Driver:
    """One attempt at a command, running or not.

    Attributes:
        name: Of this attempt, unlike any other; known before it starts.
        folder: The job's own folder; the driver works there.
        handle: What `Launcher.start` returned; empty where a service died before it could record it.
    """

    name: str
    folder: Path
    handle: Mapping[str, Any] = field(default_factory=dict)


class Launcher(ABC):
    """Starts drivers, and finds those again that a service before this one started.

    A service may die between the start of a driver and the recording of its handle. So `alive` has to know a
    driver by its name and folder alone: none is ever started beside a living one.
    """

    @abstractmethod
    def start(
        self, driver: Driver, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> Mapping[str, Any]:
        """Start a driver.

        Args:
            driver: Its name and folder.
            arguments: After `evomerge`.
            environment: What is set besides.

        Returns:
            Its handle, JSON data.

        Raises:
            UserError: It cannot be started.
        """

    @abstractmethod
    def alive(self, driver: Driver) -> bool:
        """Return whether the driver lives.

        Raises:
            UserError: That cannot be known at the moment.
        """

    @abstractmethod
    def stop(self, driver: Driver, *, kill: bool = False) -> None:
        """Ask a driver to end as by SIGTERM; `kill`: end it at once, with all its processes."""

    @abstractmethod
    def log(self, driver: Driver, most: int) -> str:
        """Return the end of what the driver has written, at most so many bytes."""

    def complaint(self, driver: Driver) -> str:
        """Return what a driver that ended said the user can mend, as one line; empty if it did not.

        Without a handle nobody knows where in the log the driver began: then it is empty too.
        """
        if not driver.handle:
            return ""
        said = complaints(self.log(driver, 1 << 14).strip().splitlines())
        return "" if said == ["interrupted"] else "; also: ".join(said)


def complaints(lines: Sequence[str]) -> list[str]:
    """Return what a command that refused says is wrong: the last lines of what it printed."""
    said: list[str] = []
    for line in reversed(lines):
        if not line.startswith(SPEAKER):
            break
        said.insert(0, line.removeprefix(SPEAKER))
    return said


class LocalLauncher(Launcher):
    """Drivers as processes of this machine, each in a session of its own, so that they outlive the service.

    The driver inherits a lock on a file of its folder. The kernel gives it up when the driver is gone,
    however it went, so a living driver is known without its process id.
    """

    def __init__(self) -> None:
        self._children: dict[Path, subprocess.Popen[bytes]] = {}

    def start(
        self, driver: Driver, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> Mapping[str, Any]:
        """Start a process. What it prints as its result goes nowhere: the store has it."""
        lock = self._lock(driver.folder)
        if lock is None:
            raise UserError(f"{driver.name}: its folder {driver.folder} has a living driver already")
        try:
            begin = self._size(driver.folder)
            with (driver.folder / LOG).open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "evomerge", *arguments],
                    cwd=driver.folder,
                    env={**clean_environment(), "PYTHONUNBUFFERED": "1", **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        except OSError as problem:
            raise UserError(f"{driver.name}: its driver cannot be started: {problem}") from None
        finally:
            os.close(lock)
        self._children[driver.folder] = child
        return {"pid": child.pid, "log": begin}

    def alive(self, driver: Driver) -> bool:
        """Return whether any process holds the folder's lock."""
        child = self._children.get(driver.folder)
        if child is not None and child.poll() is not None:
            del self._children[driver.folder]
        lock = self._lock(driver.folder)
        if lock is None:
            return True
        os.close(lock)
        return False

    def stop(self, driver: Driver, *, kill: bool = False) -> None:
        """Signal the driver, or kill its session."""
        pid = int(driver.handle.get("pid", 0))
        if pid <= 0 or not self.alive(driver):
            return
        with contextlib.suppress(ProcessLookupError):
            if kill:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)

    def log(self, driver: Driver, most: int) -> str:
        """Return the end of the log file, of this driver only."""
        try:
            with (driver.folder / LOG).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(int(driver.handle.get("log", 0)), size - most))
                return file.read(most).decode("utf-8", "replace")
        except OSError:
            return ""

    @staticmethod
    def _size(folder: Path) -> int:
        with contextlib.suppress(OSError):
            return (folder / LOG).stat().st_size
        return 0

    @staticmethod
    def _lock(folder: Path) -> int | None:
        """Return a descriptor that holds the folder's lock; None if a driver has it."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "driver.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock
