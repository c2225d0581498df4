"""What an operator decides about a service."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PORT = 8642
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Where a service keeps its files, and what it allows.

    Attributes:
        folder: Its state: token, logs, configs, results, exports.
        store: The store's URL or path.
        roots: Folders below which configs may name models, tasks and code. The first is what paths of a
            config without a folder of its own are relative to.
        host: Address to listen on.
        port: Port; 0: a free one.
        hosts: Names besides `host` that browsers may call it by.
        at_once: Drivers at once.
        restarts: How often in a row a driver that died without a new outcome is started again.
        ray_address: Drivers are submitted as Ray jobs to this address (`http://HOST:8265`); None: they are
            local processes.
        ray_python: The interpreter on the cluster's machines.
        allow_unsafe_code: Configs may set `fitness.allow_unsafe_code`.
        most_jobs: How many jobs may wait.
        most_watchers: How many may follow events at once.
        most_body: Largest request, in bytes.
        most_download: Largest exported file that is sent over HTTP, in bytes.
    """

    folder: Path
    store: str
    roots: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    hosts: tuple[str, ...] = ()
    at_once: int = 1
    restarts: int = 2
    ray_address: str | None = None
    ray_python: str = sys.executable
    allow_unsafe_code: bool = False
    most_jobs: int = 1000
    most_watchers: int = 256
    most_body: int = 1 << 20
    most_download: int = 256 << 20
    token: str = field(default="", repr=False)
    identity: str = ""
