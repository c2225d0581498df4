"""Watching: every event once and in order from any place, and nobody who does not read is waited for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from evomerge.errors import LimitError
from evomerge.service import feed
from evomerge.service.client import Message
from evomerge.store import Run
from tests.service.live import TOKEN, Live, running, settings_in


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and show often, so that the tests do not wait."""
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.2)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(settings_in(tmp_path_factory.mktemp("feed"), at_once=0, most_watchers=8)) as live:
        yield live


def new_run(live: Live, name: str, events: int) -> Run:
    run = live.store.create_run(name, {}, {})
    for place in range(events):
        run.add_event("note", {"place": place})
    return run


def ids(messages: list[Message]) -> list[int]:
    return [message.id for message in messages if message.id is not None]


def test_an_ended_run_is_told_whole_and_then_the_stream_ends(quiet: Live) -> None:
    new_run(quiet, "ended", 603).release("stopped")
    with quiet.client() as client:
        messages = list(client.events("ended"))
        assert ids(messages) == list(range(1, 604))
        assert [message.data["data"]["place"] for message in messages[:3]] == [0, 1, 2]
        assert [message.kind for message in messages[-2:]] == ["state", "end"]
        assert messages[-2].data["name"] == "ended"
        assert messages[-1].data == {"status": "stopped"}
        assert ids(list(client.events("ended", after=600))) == [601, 602, 603]
        later = list(client.events("ended", after=5000))
        assert later[0].kind == "notice"
        assert ids(later) == list(range(1, 604))


def test_what_comes_while_one_watches_comes_once_and_in_order(quiet: Live) -> None:
    run = new_run(quiet, "grows", 5)
    found: list[list[Message]] = [[], []]

    def watch(place: int) -> None:
        with quiet.client() as client:
            found[place].extend(client.events("grows"))

    threads = [threading.Thread(target=watch, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for place in range(40):
        run.add_event("note", {"place": 5 + place})
    run.release("finished")
    for thread in threads:
        thread.join(30)
    for messages in found:
        assert ids(messages) == list(range(1, 46))
        assert messages[-1].kind == "end"
    assert quiet.service.parts.hub.watchers == 0


class Raw:
    """A watcher at the level of the socket, which reads when it is told to."""

    def __init__(self, live: Live, name: str, headers: str = "") -> None:
        place = urlsplit(live.service.address)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.settimeout(30)
        self.socket.connect((place.hostname, place.port))
        request = f"GET /api/v1/runs/{name}/events HTTP/1.1\r\nhost: {place.netloc}\r\n"
        request += f"authorization: Bearer {TOKEN}\r\n{headers}\r\n"
        self.socket.sendall(request.encode())

    def until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            part = self.socket.recv(65536)
            assert part, data[-500:]
            data += part
        return data


def test_the_place_is_in_a_header_of_the_standard(quiet: Live) -> None:
    new_run(quiet, "standard", 3).release("stopped")
    watcher = Raw(quiet, "standard", "last-event-id: 2\r\n")
    text = watcher.until(b"event: end").decode()
    assert "content-type: text/event-stream; charset=utf-8" in text
    assert "cache-control: no-store" in text
    assert "id: 3\nevent: note\n" in text
    assert "id: 2\n" not in text
    garbage = Raw(quiet, "standard", "last-event-id: x'; DROP\r\n").until(b"event: end")
    assert b"id: 1\n" in garbage


def test_a_sign_of_life_comes_while_nothing_happens(quiet: Live) -> None:
    run = new_run(quiet, "still", 1)
    watcher = Raw(quiet, "still")
    assert b": still here" in watcher.until(b": still here")
    watcher.socket.close()
    run.release("stopped")


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_who_does_not_read_is_dropped_and_disturbs_nobody(
    quiet: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SEND_SECONDS", 0.3)
    run = new_run(quiet, "stalled", 0)
    large = "x" * 20_000
    for _ in range(400):
        run.add_event("note", {"text": large})
    stalled = Raw(quiet, "stalled")
    hub = quiet.service.parts.hub
    before = hub.dropped
    wait_for(lambda: hub.dropped == before + 1)
    run.release("stopped")
    with quiet.client() as client:
        assert ids(list(client.events("stalled"))) == list(range(1, 401))
    stalled.socket.close()
    wait_for(lambda: hub.watchers == 0)


def test_one_who_goes_is_forgotten(quiet: Live) -> None:
    run = new_run(quiet, "left", 1)
    hub = quiet.service.parts.hub
    watcher = Raw(quiet, "left")
    watcher.until(b"event: state")
    assert hub.watchers == 1
    watcher.socket.close()
    wait_for(lambda: hub.watchers == 0)
    run.release("stopped")


def test_so_many_watch_and_no_more(quiet: Live) -> None:
    run = new_run(quiet, "popular", 1)
    watchers = [Raw(quiet, "popular") for _ in range(8)]
    for watcher in watchers:
        watcher.until(b"event: state")
    with quiet.client() as client, pytest.raises(LimitError, match="8 watch already"):
        next(client.events("popular"))
    run.release("stopped")
    for watcher in watchers:
        watcher.until(b"event: end")
        watcher.socket.close()
    wait_for(lambda: quiet.service.parts.hub.watchers == 0)


def test_a_job_is_watched_before_its_run_begins(quiet: Live) -> None:
    parts = quiet.service.parts
    parts.queue.submit("later", {}, "/m", digest="d")
    watcher = Raw(quiet, "later")
    assert b'"status":"queued"' in watcher.until(b'"status":"queued"')
    run = quiet.store.create_run("later-on", {}, {})
    run.release("stopped")
    parts.queue.cancel("later")
    assert b'event: end\ndata: {"status":"cancelled"}' in watcher.until(b'{"status":"cancelled"}')


def test_a_service_that_ends_ends_its_streams(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, at_once=0)) as live:
        run = new_run(live, "goes-on", 1)
        watcher = Raw(live, "goes-on")
        watcher.until(b"event: state")
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert run.owner is not None
    text = watcher.socket.recv(65536)
    assert b"event: end" not in text  # the run has not ended: a client comes back
