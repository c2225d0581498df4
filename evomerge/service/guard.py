"""What every request has to pass before a route sees it, and the headers that every answer gets.

Plain ASGI, outside of the web framework, so that no route can be added without it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from evomerge.service.settings import LOOPBACK, ServiceSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Observe = Callable[[str, int, float], None]
"""Called with method, status and seconds when an answer begins."""

HEALTH = "/api/v1/health"
BODY_SECONDS = 30.0
"""Longest time in which a request's body may come."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is answered here.

    Attributes:
        status: The HTTP status.
        kind: One word for machines.
        headers: More headers of the answer.
    """

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


def error_body(
    kind: str, message: str, key: str | None = None, others: Sequence[Mapping[str, str | None]] = ()
) -> dict[str, Any]:
    """Return the one shape of all errors.

    Args:
        kind: One word for machines.
        message: What is wrong.
        key: Path of the config's key at fault.
        others: Message and key of whatever else is wrong.
    """
    return {"error": {"kind": kind, "message": message, "key": key, "others": list(others)}}


class Guard:
    """Wraps the application.

    A request has to name this service as its host (a foreign page that points its own name at this address
    cannot), must not come from another site's page, has to carry the token unless it asks for the health or
    for the dashboard's own files, and may not be larger than the operator allows.

    Args:
        application: What is guarded.
        settings: The operator's, with the token.
        observe: Told of every answer.
    """

    def __init__(self, application: Application, settings: ServiceSettings, observe: Observe) -> None:
        self._application, self._settings, self._observe = application, settings, observe
        own = {settings.host, *settings.hosts}
        self._hosts = own | set(LOOPBACK) if settings.host in LOOPBACK else own
        self._token = settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._application(scope, receive, send)
            return  # a websocket is closed by the server
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        send = self._observed(scope, send)
        try:
            self._check_host(scope, headers)
            self._check_site(headers)
            self._check_token(scope, headers)
            receive = await self._whole_body(headers, receive)
            await self._application(scope, receive, send)
        except Refused as refusal:
            await _answer(refusal, send)

    def _check_host(self, scope: Scope, headers: dict[str, str]) -> None:
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1 or _host(headers["host"]) not in self._hosts:
            raise Refused(
                421,
                "wrong_host",
                f"the service is not called {headers.get('host', '')[:100]!r}; "
                "its operator adds names with --allow-host",
            )

    def _check_site(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        navigates = headers.get("sec-fetch-mode") == "navigate" and origin is None
        if origin is not None:
            foreign = urlsplit(origin).netloc.lower() != headers["host"].lower()
        if foreign and not navigates:
            raise Refused(403, "cross_site", "requests from pages of other sites are refused")

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        if reads and (path in (HEALTH, "/") or path.startswith("/static/")):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            problem = "expected the header `Authorization: Bearer TOKEN` with the token of the token file"
            if kind.lower() == "bearer":
                problem = "the token is not this service's (EVOMERGE_TOKEN goes before a token file)"
            raise Refused(401, "no_token", problem, **{"www-authenticate": "Bearer"})

    async def _whole_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the body, which is small or refused, and return what gives it to the application."""
        most = self._settings.most_body
        refusal = Refused(413, "too_large", f"the request is larger than {most} bytes")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length[:20]) > most:
            raise refusal
        body, more = b"", True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    part = await receive()
                    if part["type"] == "http.disconnect":
                        break
                    body, more = body + part.get("body", b""), part.get("more_body", False)
                    if len(body) > most:
                        raise refusal
        except TimeoutError:
            raise Refused(408, "too_slow", f"the request took longer than {BODY_SECONDS:.0f} s") from None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def given() -> Message:
            return waiting.pop() if waiting else await receive()

        return given

    def _observed(self, scope: Scope, send: Send) -> Send:
        """Return what adds the headers and counts the answer."""
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._observe(scope["method"], message["status"], time.perf_counter() - began)
                present = {name.lower() for name, _ in message.get("headers", [])}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        return sending


def _host(header: str) -> str:
    """Return the host of a Host header, without port and brackets; empty if it is none."""
    try:
        return urlsplit(f"//{header}").hostname or "" if "@" not in header and "/" not in header else ""
    except ValueError:
        return ""


async def _answer(refusal: Refused, send: Send) -> None:
    body = json.dumps(error_body(refusal.kind, str(refusal))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
