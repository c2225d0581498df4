"""URLs, messages without secrets, and who counts as alive."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from evomerge.errors import StoreError
from evomerge.store import Store
from evomerge.store.owner import Owner


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:secret@h/d", 'unknown kind "mysql"'),
        ("postgresql://u:secret@h:port/d", "the URL cannot be read"),
        ("sqlite:///x.db?mode=ro", "three slashes and no options"),
        ("sqlite://x.db", "three slashes and no options"),
        ("sqlite://", "needs a file"),
        (":memory:", "needs a file"),
        ("", "needs a file"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@127.0.0.1:1/d",
        "postgresql+psycopg://u:secret@127.0.0.1:1/d?sslmode=disable",
        "postgresql://u@localhost:1/d?password=secret",
        "postgresql://u:secret@/d?host=/nowhere/secret",
        "postgresql://u:secret@/d?unknown_option=1",
    ],
)
def test_an_unreachable_server_is_named_and_the_password_is_not(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    message = str(caught.value)
    assert message.startswith("store postgresql://u")
    assert "connect" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.postgres
def test_a_missing_database_is_named(postgres: str) -> None:
    with pytest.raises(StoreError, match='database "missing" does not exist; check that the server runs'):
        Store.open(postgres.replace("/postgres?", "/missing?"))


@pytest.mark.postgres
def test_a_server_that_restarts_between_writes_is_reached_again(postgres: str) -> None:
    import psycopg

    from tests.postgres import fresh_schema

    url = fresh_schema(postgres)
    with Store.open(url) as store:
        run = store.create_run("r", {}, {})
        with psycopg.connect(url, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'evomerge'"
            )
        run.add_event("note", {})
        assert len(run.events()) == 1


@pytest.mark.postgres
def test_a_server_that_drops_us_in_a_write_costs_that_write_only(postgres: str) -> None:
    from tests.postgres import fresh_schema

    with Store.open(fresh_schema(postgres)) as store:
        run = store.create_run("r", {}, {})
        with pytest.raises(StoreError) as caught, run._writing() as connection:  # noqa: PT012
            connection.exec_driver_sql("INSERT INTO events VALUES (1, 1, 0, 'half', '{}')")
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        assert "\n" not in str(caught.value)
        assert run.events() == []
        run.add_event("note", {})


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_psycopg(name: str, *rest: object, **more: object) -> object:
        if name.startswith("psycopg"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_psycopg)
    with pytest.raises(StoreError, match=r"driver is missing; pip install 'evomerge\[postgres\]'"):
        Store.open("postgresql://u@h/d")


def test_importing_the_store_loads_no_torch_and_no_ray() -> None:
    program = "import sys, evomerge.store; print({'torch', 'ray', 'psycopg'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_who_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Owner.here()
    assert Owner.of_json(here.to_json()) == here
    assert Owner.of_json(None) is None
    assert here.pid == os.getpid()
    assert here.alive(silence=1e9)
    assert not replace(here, started="tick 0").alive(silence=0)
    elsewhere = replace(here, host="elsewhere")
    assert elsewhere.alive(silence=59)
    assert not elsewhere.alive(silence=61)
    # A container of the same host name sees other processes.
    assert not replace(here, host=here.host.split()[0] + " pid:[1]").alive(silence=61)

    def denied(_pid: int) -> psutil.Process:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", denied)
    assert here.alive(silence=0)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    owner = replace(Owner.here(), pid=child.pid)
    ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    owner = replace(owner, started=f"tick {ticks}")
    assert owner.alive(silence=0)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not owner.alive(silence=0)
    child.wait()
    child.stdin.close()
    assert not owner.alive(silence=0)
