"""A service in a thread of the test's process, on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from evomerge.service.client import Client
from evomerge.service.server import Service
from evomerge.service.settings import ServiceSettings
from evomerge.store import Store

TOKEN = "a-token-of-the-tests-that-is-long-enough"


class Live:
    """A running service.

    Attributes:
        service: It.
        http: A client that carries the token.
        root: The operator's only root.
    """

    def __init__(self, service: Service, root: Path) -> None:
        self.service, self.root = service, root
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.http = httpx.Client(base_url=f"{service.address}/api/v1", headers=headers, timeout=60)

    @property
    def store(self) -> Store:
        return self.service.parts.store

    def client(self) -> Client:
        return Client(self.service.address, TOKEN)

    def error(self, answer: httpx.Response, status: int) -> str:
        """Return the message of an answer that must be an error in the one shape."""
        assert answer.status_code == status, answer.text
        body = answer.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"kind", "message", "key", "others"}
        assert "\n" not in body["error"]["message"]
        return str(body["error"]["message"])


def settings_in(folder: Path, **changes: Any) -> ServiceSettings:
    """Return settings of a service whose files are below a folder."""
    root, state = folder / "root", folder / "state"
    root.mkdir(exist_ok=True)
    state.mkdir(exist_ok=True)
    settings = ServiceSettings(
        folder=state,
        store=str(folder / "runs.db"),
        roots=(root.resolve(),),
        port=0,
        token=TOKEN,
        identity="tests",
    )
    return replace(settings, **changes)


@contextmanager
def running(settings: ServiceSettings) -> Iterator[Live]:
    """Run a service while the block lasts."""
    service = Service(settings)
    thread = threading.Thread(target=service.run)
    thread.start()
    live = Live(service, settings.roots[0])
    try:
        yield live
    finally:
        live.http.close()
        service.stop()
        thread.join(20)
        assert not thread.is_alive()
