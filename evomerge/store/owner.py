"""Who drives a run, and whether that process is still alive."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LEASE_SECONDS = 60.0
"""A driver on another host counts as alive for this long after its last write."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that drives a run.

    Attributes:
        host: Host name; on Linux with the process namespace, because containers may share a host name
            but cannot see each other's processes.
        pid: Process id on that host.
        started: When the process started, as text to compare: a reused pid starts at another time.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Owner:
        """Return this process."""
        return cls(_host(), os.getpid(), _started(os.getpid()) or "")

    @classmethod
    def of_json(cls, text: str | None) -> Owner | None:
        """Return the owner that `to_json` wrote; None for a run without driver."""
        return cls(**json.loads(text)) if text else None

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self))

    def alive(self, silence: float) -> bool:
        """Return whether the process still lives.

        Args:
            silence: Seconds since its last write by the database's clock; decides for other hosts only.
        """
        if self.host != _host():
            return silence < LEASE_SECONDS
        try:
            return _started(self.pid) == self.started
        except psutil.AccessDenied:
            # It exists; a wrong refusal is mended by hand, a second driver is not.
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}"


def _host() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return a mark of the process's start; None when it is dead or a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # The kernel's own tick count: psutil derives its time from a wall clock that may jump.
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            return f"tick {stat.read_text(errors='replace').rpartition(')')[2].split()[19]}"
        return f"time {process.create_time()}"
    except (psutil.NoSuchProcess, OSError):
        return None
