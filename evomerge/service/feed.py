"""Live events of runs for many watchers: one look into the store for all who watch a run.

A watcher is a place in the run's event log. What is new is read once and kept for a while; a watcher that is
further behind reads pages of the store. So nothing piles up for a watcher that does not read, and one whose
connection takes nothing for `SEND_SECONDS` is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from evomerge.errors import EvomergeError, LimitError
from evomerge.report.overview import LIVE, one_run
from evomerge.service.guard import Receive, Scope, Send
from evomerge.store import Event, Store

LOOK_SECONDS = 0.5
BEAT_SECONDS = 15.0
SEND_SECONDS = 30.0
PAGE = 500
Entry = tuple[int, str]
"""An event's id, and the event as it is sent."""

KEPT = 1000


class Feed:
    """What is new in one run."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.watchers = 0
        self.recent: deque[Entry] = deque(maxlen=KEPT)
        self.head = 0
        self.state: dict[str, Any] = {}
        self.version = 0
        self.broken = ""
        self._store = store
        self._news = asyncio.Event()

    async def begin(self) -> None:
        """Look for the first time; MissingError if there is no such run."""
        self.state = await asyncio.to_thread(one_run, self._store, self.name)
        self.version = 1
        self.head = await asyncio.to_thread(self._last)

    async def follow(self) -> None:
        """Look again and again while anybody watches."""
        while self.watchers:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                state = await asyncio.to_thread(one_run, self._store, self.name)
                events = await self._new()
            except EvomergeError as problem:
                self.broken = str(problem)
                self.tell()
                return
            if state != self.state:
                self.state, self.version = state, self.version + 1
                self.tell()
            elif events:
                self.tell()

    async def _new(self) -> bool:
        """Take in all new events; return whether there were any."""
        before = self.head
        while page := await self.page(self.head):
            self.recent.extend(page)
            self.head = page[-1][0]
        return self.head > before

    def tell(self) -> None:
        """Wake everybody who waits."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def wait(self, seconds: float) -> None:
        """Wait for something new."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    async def after(self, place: int) -> list[Entry]:
        """Return a page of the events behind a place of the log."""
        if place >= self.head:
            return []
        if self.recent and self.recent[0][0] <= place + 1:
            return list(self.recent)[place + 1 - self.recent[0][0] :][:PAGE]  # ids have no gaps
        return [entry for entry in await self.page(place) if entry[0] <= self.head]

    async def page(self, place: int) -> list[Entry]:
        """Return a page of the store's events behind a place."""
        return await asyncio.to_thread(self._page, place)

    def _page(self, place: int) -> list[Entry]:
        view = self._store.find(self.name)
        events = [] if view is None else view.events(place, limit=PAGE)
        return [(event.id, _event(event)) for event in events]

    def _last(self) -> int:
        view = self._store.find(self.name)
        return 0 if view is None else view.last_event()


class Hub:
    """The feeds of all runs that are watched.

    Args:
        store: Where the runs are.
        most: How many may watch at once.

    Attributes:
        watchers: How many watch now.
        dropped: How many were dropped because they did not read.
        closing: Whether the service is about to end; streams end then.
    """

    def __init__(self, store: Store, most: int) -> None:
        self._store, self._most = store, most
        self._feeds: dict[str, Feed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.watchers = 0
        self.dropped = 0
        self.closing = False

    def close(self) -> None:
        """End all streams; from any thread."""
        self.closing = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._tell_all)

    def _tell_all(self) -> None:
        for feed in self._feeds.values():
            feed.tell()

    async def watch(self, name: str) -> Feed:
        """Begin to watch a run; `leave` must follow.

        Raises:
            MissingError: There is no such run.
            LimitError: Too many watch already.
        """
        if self.watchers >= self._most:
            raise LimitError(f"{self._most} watch already; come back later")
        self.watchers += 1
        self._loop = asyncio.get_running_loop()
        try:
            feed = self._feeds.get(name)
            if feed is None:
                feed = Feed(self._store, name)
                await feed.begin()
                feed = self._feeds.setdefault(name, feed)
        except BaseException:
            self.watchers -= 1
            raise
        feed.watchers += 1
        if feed.watchers == 1:
            task = asyncio.create_task(feed.follow())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return feed

    def leave(self, feed: Feed) -> None:
        """Stop watching."""
        self.watchers -= 1
        feed.watchers -= 1
        if not feed.watchers and self._feeds.get(feed.name) is feed:
            del self._feeds[feed.name]


class EventStream(Response):
    """An answer of server-sent events: the log behind a place, then what comes, until the run has ended.

    Args:
        hub: The hub.
        feed: From `Hub.watch`.
        place: Id of the last event that the client has.
    """

    def __init__(self, hub: Hub, feed: Feed, place: int) -> None:
        super().__init__()
        self._hub, self._feed, self._place = hub, feed, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client has gone or takes nothing."""
        del scope
        tasks = [asyncio.create_task(self._send(send)), asyncio.create_task(_gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._hub.leave(self._feed)

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for text in self._messages():
                part = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                await asyncio.wait_for(send(part), SEND_SECONDS)
            await asyncio.wait_for(send({"type": "http.response.body", "body": b""}), SEND_SECONDS)
        except TimeoutError:
            self._hub.dropped += 1

    async def _messages(self) -> AsyncIterator[str]:
        feed, place, version = self._feed, self._place, 0
        if place > feed.head:
            yield _message("notice", {"message": f"there is no event {place} yet; beginning anew"})
            place = 0
        while not self._hub.closing:
            events = await feed.after(place)
            if events:
                place = events[-1][0]
                yield "".join(text for _, text in events)
                continue
            if version != feed.version:
                version, state = feed.version, feed.state
                yield _message("state", state)
                if state["status"] not in LIVE and place >= feed.head:
                    yield _message("end", {"status": state["status"]})
                    return
                continue
            if feed.broken:
                yield _message("end", {"status": "unknown", "message": feed.broken})
                return
            await feed.wait(BEAT_SECONDS)
            if version == feed.version and place >= feed.head:
                yield ": still here\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(event: Event) -> str:
    data = {"id": event.id, "at": event.at, "kind": event.kind, "data": dict(event.data)}
    return f"id: {event.id}\n" + _message(event.kind, data)


def _message(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
