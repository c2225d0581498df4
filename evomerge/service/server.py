"""The process: one service on its folder, listening until it is told to end."""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from evomerge.errors import UserError
from evomerge.service.app import make_app, make_parts
from evomerge.service.feed import Hub
from evomerge.service.settings import ServiceSettings
from evomerge.service.state import identity_of, own_folder, token_of

STALLED_MILLISECONDS = 60_000
"""A connection that takes nothing for so long is cut by the kernel."""


class _Server(uvicorn.Server):
    """Ends the event streams first: a stream would keep the server from ending."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._hub.close()


class Service:
    """A service that has its store open and its port taken, and does nothing before `run`.

    Args:
        settings: The operator's, with token and identity.

    Attributes:
        address: Where it is reached.
        parts: Its parts.

    Raises:
        UserError: The port is taken, or the store cannot be opened.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._listener = _listen(settings)
        try:
            self.parts = make_parts(settings)
        except BaseException:
            self._listener.close()
            raise
        host, port = self._listener.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            make_app(self.parts),
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            limit_concurrency=settings.most_watchers + 100,
            ws="none",
        )
        self._server = _Server(config, self.parts.hub)

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or `stop`."""
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()

    def stop(self) -> None:
        """End the service; from any thread."""
        self._server.should_exit = True
        self.parts.hub.close()


def serve(settings: ServiceSettings, *, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGINT or SIGTERM. Drivers that run go on without the service.

    Args:
        settings: The operator's, without token and identity: those are the folder's.
        ready: Called with the address once connections are taken.

    Raises:
        UserError: The folder is served already, the port is taken, or the store cannot be opened; what
            did not exist before does not exist then.
    """
    with own_folder(settings.folder) as begun:
        token, identity = token_of(settings.folder), identity_of(settings.folder)
        service = Service(dataclasses.replace(settings, token=token, identity=identity))
        ready(service.address)
        begun()
        service.run()


def _listen(settings: ServiceSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        _set(listener, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            _set(listener, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MILLISECONDS)
        listener.bind(address)
        listener.listen(512)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise UserError(
            f"--host {settings.host} --port {settings.port}: cannot listen there: {reason}"
        ) from None
    return listener


def _set(listener: socket.socket, *option: Any) -> None:
    listener.setsockopt(*option)
