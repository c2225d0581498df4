"""A service as a Python object: what its routes return, as plain data."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from evomerge.errors import ConfigError, ConflictError, LimitError, MissingError, ServerError, UserError
from evomerge.service.settings import LOOPBACK

API = "/api/v1"
RETRY_SECONDS = 2.0
GONE_SECONDS = 60.0
"""How long `events` waits for a service that does not answer, such as one that is started anew."""

STREAM_SECONDS = 45.0
"""A stream in which nothing comes for so long is broken: the service says thrice as often that it lives."""

_KINDS: dict[str, type[UserError]] = {
    "missing": MissingError,
    "conflict": ConflictError,
    "busy": LimitError,
    "config": ConfigError,
    "input": UserError,
}


@dataclass(frozen=True, slots=True)
class Message:
    """One server-sent event.

    Attributes:
        id: Its id in the run's log; None for `state`, `notice` and `end`.
        kind: What kind of thing.
        data: Its data.
    """

    id: int | None
    kind: str
    data: Mapping[str, Any]


class Client:
    """Calls one service. A context manager; one thread at a time.

    Args:
        server: Its address, such as `http://127.0.0.1:8642`.
        token: Its token.
        timeout: Seconds for one call.

    Raises:
        ServerError: From every method: the service cannot be reached or refuses the token. What the service
            refuses otherwise is raised as the class that the library raises: ConfigError, MissingError,
            ConflictError, LimitError, UserError.
    """

    def __init__(self, server: str, token: str, *, timeout: float = 30.0) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ServerError(f"server {server}: expected http://HOST:PORT or https://HOST")
        self.server = server.rstrip("/")
        headers = {"authorization": f"Bearer {token}"}
        # A proxy of the environment is for other machines, and would see the token.
        proxied = parts.hostname not in LOOPBACK
        self._http = httpx.Client(
            base_url=self.server + API, headers=headers, timeout=timeout, trust_env=proxied
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def info(self) -> dict[str, Any]:
        """Return what the service is and allows."""
        return self._get("/info")

    def submit(
        self,
        config: Mapping[str, Any] | str,
        *,
        folder: str | None = None,
        changes: Sequence[str] = (),
        priority: int = 0,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Queue a run; return its line.

        Args:
            config: A config as plain data or as YAML text.
            folder: What its paths are relative to, on the service's machine; None: its first root.
            changes: Overrides, as `section.key=value`.
            priority: Higher ones start first.
            key: Idempotency-Key; a submission of the same name and config is recognised without one.
        """
        body = {"config": config, "folder": folder, "changes": list(changes), "priority": priority}
        return self._post("/runs", body, {"idempotency-key": key} if key else {})

    def validate(
        self,
        config: Mapping[str, Any] | str,
        *,
        folder: str | None = None,
        changes: Sequence[str] = (),
        quick: bool = False,
    ) -> dict[str, Any]:
        """Check a config as `evomerge validate` does; `quick`: without reading sources and tasks."""
        body = {"config": config, "folder": folder, "changes": list(changes), "quick": quick}
        return self._post("/configs/validate", body)

    def runs(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the lines of all runs, the newest first."""
        after: str | None = None
        while True:
            found = self._get("/runs", {"status": status, "after": after, "limit": 500})
            yield from found["runs"]
            after = found["next"]
            if after is None:
                return

    def show(self, name: str) -> dict[str, Any]:
        """Return what a run found."""
        return self._get(f"/runs/{_name(name)}")

    def candidates(self, name: str, **wanted: Any) -> dict[str, Any]:
        """Return a page of candidates; `status`, `sort`, `descending`, `offset`, `limit` as in the API."""
        return self._get(f"/runs/{_name(name)}/candidates", wanted)

    def cancel(self, name: str, *, now: bool = False) -> dict[str, Any]:
        """End a run; return its line."""
        return self._post(f"/runs/{_name(name)}/cancel", {"now": now})

    def resume(self, name: str, **wish: Any) -> dict[str, Any]:
        """Go on with a run; `evaluations`, `workers`, `changes`, `accept_drift`, `priority` as in the API."""
        return self._post(f"/runs/{_name(name)}/resume", wish)

    def export(self, name: str, candidate: int | None = None) -> dict[str, Any]:
        """Have a candidate, None for the winner, written as a model; return how far that is."""
        return self._post(f"/runs/{_name(name)}/exports", {"candidate": candidate})

    def export_state(self, name: str, number: int) -> dict[str, Any]:
        """Return how far an export is, with its files once it is done."""
        return self._get(f"/runs/{_name(name)}/exports/{number}")

    def download(self, name: str, number: int, file: str, target: Path) -> None:
        """Write one file of an export to `target`."""
        path = f"/runs/{_name(name)}/exports/{number}/files/{_name(file)}"
        try:
            with self._http.stream("GET", path) as answer, target.open("xb") as out:
                if answer.is_error:
                    answer.read()
                    raise _problem(answer)
                for part in answer.iter_bytes():
                    out.write(part)
        except httpx.HTTPError as problem:
            raise ServerError(f"server {self.server}: {file}: {_reason(problem)}") from None

    def logs(self, name: str) -> str:
        """Return the end of what a run's driver has written."""
        return str(self._get(f"/runs/{_name(name)}/logs")["text"])

    def workers(self, name: str) -> dict[str, Any]:
        """Return what a run's workers do now."""
        return self._get(f"/runs/{_name(name)}/workers")

    def events(self, name: str, after: int = 0) -> Iterator[Message]:
        """Yield a run's events until it has ended; a broken connection is mended without loss or repeats."""
        while True:
            try:
                for message in self._stream(name, after):
                    after = message.id if message.id is not None else after
                    yield message
                    if message.kind == "end":
                        return
            except httpx.TransportError:
                pass
            self._wait_for_service()

    def _wait_for_service(self) -> None:
        """Wait until the service answers; one that is gone for good is an error."""
        end = time.monotonic() + GONE_SECONDS
        while True:
            time.sleep(RETRY_SECONDS)
            try:
                self.info()
                return
            except ServerError:
                if time.monotonic() > end:
                    raise

    def _stream(self, name: str, after: int) -> Iterator[Message]:
        headers = {"last-event-id": str(after), "accept": "text/event-stream"}
        path = f"/runs/{_name(name)}/events"
        with self._http.stream("GET", path, headers=headers, timeout=STREAM_SECONDS) as answer:
            if answer.is_error:
                answer.read()
                raise _problem(answer)
            yield from _messages(answer.iter_lines())

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return self._call("GET", path, params=given)

    def _post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._call("POST", path, json=body, headers=dict(headers or {}))

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.HTTPError as problem:
            raise ServerError(f"server {self.server}: cannot be reached: {_reason(problem)}") from None
        if answer.is_error:
            raise _problem(answer)
        try:
            data: dict[str, Any] = answer.json()
        except ValueError:
            raise ServerError(f"server {self.server}: its answer is none of an evomerge service") from None
        return data


def token_from(text: str | None, file: Path | None) -> str:
    """Return a token: the text, or what the file holds.

    Raises:
        ServerError: Neither is given.
    """
    from evomerge.service.state import read_secret

    if text:
        return text
    if file is None:
        raise ServerError("no token: set EVOMERGE_TOKEN, or name the service's token file with --token-file")
    return read_secret(file)


def _messages(lines: Iterator[str]) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                number = fields.get("id")
                data = json.loads(fields["data"])
                yield Message(None if number is None else int(number), fields.get("event", ""), data)
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def _name(name: str) -> str:
    """Return a run's name as it may stand in a path; the service says that there is no run of another one."""
    return quote(name[:300], safe="")


def _problem(answer: httpx.Response) -> UserError:
    try:
        error = answer.json()["error"]
        kind, message = str(error["kind"]), str(error["message"])
        others = [str(other["message"]) for other in error.get("others", [])]
    except (ValueError, KeyError, TypeError):
        return ServerError(
            f"server {answer.url.host}: answered {answer.status_code}, as no evomerge service does"
        )
    return _KINDS.get(kind, ServerError)(message, others)


def _reason(problem: Exception) -> str:
    return (str(problem).splitlines() or [""])[0] or type(problem).__name__
