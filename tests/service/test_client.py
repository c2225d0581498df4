"""The client raises what the library raises, and follows a run over a service that is started anew."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from evomerge.errors import ConfigError, ConflictError, MissingError, ServerError, UserError
from evomerge.service import client as module
from evomerge.service.client import Client, Message, token_from
from tests.service.live import TOKEN, Live, running, settings_in


def test_it_raises_what_the_library_raises(live: Live) -> None:
    with live.client() as client:
        with pytest.raises(MissingError, match='did you mean "demo"'):
            client.show("dem")
        with pytest.raises(MissingError):
            client.show("../../etc/passwd")
        with pytest.raises(ConflictError, match="it is finished"):
            client.cancel("demo")
        with pytest.raises(ConfigError, match='space.method: unknown merge method "tie"'):
            client.validate({"name": "x", "space": {"method": "tie"}})
        with pytest.raises(ConfigError) as caught:
            client.validate({"name": "x", "space": {"method": "tie"}, "seed": -1})
        assert [line.removeprefix("config: ").partition(":")[0] for line in caught.value.lines] == [
            *("seed", "space.method", "sources", "fitness")
        ]
        with pytest.raises(UserError, match=r"query\.limit"):
            client.candidates("demo", limit=0)
        assert client.candidates("demo", limit=1)["candidates"][0]["number"] == 0
    with (
        Client(live.service.address, "wrong") as stranger,
        pytest.raises(ServerError, match="the token is not this service's"),
    ):
        stranger.info()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8642", "file:///etc/passwd", "http://", "http://user:secret@host", "http://h/?t=1"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ServerError, match="expected http://"):
        Client(address, TOKEN)


def test_a_proxy_does_not_see_what_stays_on_this_machine(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with live.client() as client:
        assert client.info()["version"]


def test_where_a_token_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert token_from("given", file) == "given"
    assert token_from(None, file) == TOKEN
    with pytest.raises(ServerError, match="set EVOMERGE_TOKEN"):
        token_from(None, None)
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        token_from("", file)


def test_pages_of_runs_are_one_list(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, at_once=0)) as live, live.client() as client:
        for number in range(501):
            live.service.parts.queue.submit(f"r{number}", {}, "/m", digest=str(number))
        names = [line["name"] for line in client.runs()]
        assert sorted(names) == sorted(f"r{number}" for number in range(501))


def test_events_go_on_over_a_service_that_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    settings = settings_in(tmp_path, at_once=0)
    found: list[Message] = []
    came = threading.Event()

    def follow(client: Client) -> None:
        for message in client.events("r"):
            found.append(message)
            came.set()

    with running(settings) as live:
        run = live.store.create_run("r", {}, {})
        run.add_event("note", {"place": 0})
        client = live.client()
        thread = threading.Thread(target=follow, args=(client,))
        thread.start()
        assert came.wait(20)
        port = urlsplit(live.service.address).port
    assert port is not None
    with running(replace(settings, port=port)) as live:
        later = live.store.take_run("r")
        later.add_event("note", {"place": 1})
        later.release("stopped")
        thread.join(30)
        assert not thread.is_alive()
    client.close()
    assert [message.data["data"]["place"] for message in found if message.kind == "note"] == [0, 1]
    assert found[-1].kind == "end"
