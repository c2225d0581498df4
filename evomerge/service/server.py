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
from evomerge.service.state import identity_of, make_folder, only_one, token_of

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


def serve(settings: ServiceSettings, *, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGINT or SIGTERM. Drivers that run go on without the service.

    Args:
        settings: The operator's, without token and identity: those are the folder's.
        ready: Called with the address once connections are taken.

    Raises:
        UserError: The folder is served already, the port is taken, or the store cannot be opened.
    """
    make_folder(settings.folder)
    with only_one(settings.folder):
        token, identity = token_of(settings.folder), identity_of(settings.folder)
        settings = dataclasses.replace(settings, token=token, identity=identity)
        listener = _listen(settings)
        try:
            parts = make_parts(settings)
            config = uvicorn.Config(
                make_app(parts),
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
                limit_concurrency=settings.most_watchers + 100,
                ws="none",
            )
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{port}")
            _Server(config, parts.hub).run(sockets=[listener])
        finally:
            listener.close()


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
