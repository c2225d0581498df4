"""The service through its commands: a run's whole life, and what is killed on the way is not lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evomerge.service.client import Client
from evomerge.store import Store
from tests.e2e.world import command, evomerge, make_world, write_config


class Served:
    """`evomerge serve` in a process of its own.

    Attributes:
        folder: The world: the operator's root, and where commands run.
        state: The service's own files.
        store: The store.
        seconds: How long a candidate takes.
    """

    def __init__(self, folder: Path, place: Path, seconds: float) -> None:
        self.folder, self.state, self.store = folder, place / "state", place / "runs.db"
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self, *options: str) -> None:
        arguments = ("serve", "--port", "0", "--folder", self.state, "--store", self.store, *options)
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=self.folder,
            env={**os.environ, "FITNESS_SECONDS": str(self.seconds)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("serving "), line
        self.address = line.split()[-1]
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            self.client().info()
        except Exception:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=30)

    def client(self) -> Client:
        return Client(self.address, (self.state / "token").read_text().strip())

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        token = str(self.state / "token")
        env = {"EVOMERGE_SERVER": self.address, "EVOMERGE_TOKEN_FILE": token, "COLUMNS": "120"}
        return evomerge(self.folder, *arguments, env=env)

    def driver(self, name: str) -> int:
        """Wait until a run has a driver; return its process id."""
        found: list[int] = []

        def driven() -> bool:
            with Store.open(self.store, create=False) as store:
                view = store.find(name)
                if view is not None and view.owner is not None and view.owner_alive:
                    found.append(view.owner.pid)
            return bool(found)

        wait_for(driven)
        return found[0]

    def started(self, name: str) -> list[int]:
        """Return the process ids of all drivers that a run has had."""
        with Store.open(self.store, create=False) as store:
            return [event.data["pid"] for event in store.run(name).events(kind="started")]

    def wait_for_outcomes(self, name: str, count: int) -> None:
        def enough() -> bool:
            with Store.open(self.store, create=False) as store:
                view = store.find(name)
                return view is not None and len(view.outcomes(values=False)) >= count

        wait_for(enough)

    def wait_for_status(self, name: str, status: str) -> dict[str, Any]:
        with self.client() as client:
            wait_for(lambda: client.show(name)["status"] == status)
            return client.show(name)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@contextmanager
def served(world: Path, place: Path, *options: str, seconds: float = 0.1) -> Iterator[Served]:
    found = Served(world, place, seconds)
    found.start(*options)
    try:
        yield found
    finally:
        if found.process is not None and found.process.poll() is None:
            found.kill(signal.SIGTERM)
        # A test that failed may leave drivers; those are processes that the service's jobs name.
        with Store.open(found.store) as store:
            for view in store.runs():
                if view.owner is not None and view.owner_alive:
                    os.kill(view.owner.pid, signal.SIGKILL)


def test_a_run_from_submit_to_export(world: Path, tmp_path: Path) -> None:
    with served(world, tmp_path, seconds=0.0) as service:
        done = service.command("submit", "config.yaml", "--watch", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "finished"
        assert "phase: select" in done.stderr

        failed = service.command(
            "submit", "config.yaml", "--name", "bad", "--watch", "--set", "space.split=[x]"
        )
        assert failed.returncode == 2
        assert 'error: space.split: no tensor is "x"' in failed.stderr

        # The same again is the same run; another config of that name is refused in one line.
        assert service.command("submit", "config.yaml").stdout == "small: finished\n"
        other = service.command("submit", "config.yaml", "--set", "seed=5")
        assert (other.returncode, other.stderr) == (
            2,
            'evomerge: run "small" exists with another config; choose another name\n',
        )

        # The same words and output as at the store.
        for words in (("runs",), ("show", "small", "--json")):
            remote = service.command(*words)
            local = evomerge(world, *words, "--store", service.store, env={"COLUMNS": "120"})
            assert (remote.returncode, remote.stdout) == (0, local.stdout)

        refused = service.command("resume", "small", "--set", "seed=5")
        assert (refused.returncode, "seed: cannot change" in refused.stderr) == (2, True)
        assert service.command("resume", "small", "--evaluations", "14").stdout == "small: queued\n"
        assert service.command("watch", "small").stderr.splitlines()[-1].startswith("finished: ")
        with service.client() as client:
            assert client.show("small")["evaluations"] == 14
            assert service.command("export", "small", "model").stdout == "wrote model\n"
            written = Path(client.export("small")["path"])
        for path in written.iterdir():
            assert (world / "model" / path.name).read_bytes() == path.read_bytes()
        again = service.command("export", "small", "model")
        assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)


def test_wrong_configs_and_cancelled_jobs(world: Path, tmp_path: Path) -> None:
    with served(world, tmp_path, "--at-once", "1", seconds=0.3) as service, service.client() as client:
        config = (world / "config.yaml").read_text()
        found = client.validate(config, folder=str(world), changes=["name=x"])
        assert found["summary"]["run"] == "x"
        client.submit(config, folder=str(world), changes=["name=absent", "sources.models.0=./no"])
        shown = service.wait_for_status("absent", "failed")
        assert "no such folder" in shown["error"]
        assert "no such folder" in client.logs("absent")

        client.submit(config, folder=str(world), changes=["name=first"])
        service.wait_for_outcomes("first", 2)
        for name in ("second", "third"):
            client.submit(config, folder=str(world), changes=[f"name={name}"])
        assert {line["name"]: line["status"] for line in client.runs()} == {
            "absent": "failed",
            "first": "running",
            "second": "queued",
            "third": "queued",
        }
        (worker,) = client.workers("first")["workers"]
        assert worker["state"] == "busy"
        assert service.command("cancel", "third").stdout == "third: cancelled\n"
        said = service.command("cancel", "first").stdout
        assert said == "first: stops after the candidates that are running\n"
        service.wait_for_status("first", "stopped")
        service.wait_for_outcomes("second", 1)
        # Without the service: the request goes through the store.
        now = evomerge(world, "cancel", "second", "--now", "--store", service.store)
        assert now.stdout == "second: stops now\n"
        service.wait_for_status("second", "stopped")
        assert service.command("cancel", "second").returncode == 2


def test_what_is_killed_goes_on_and_nothing_is_started_twice(world: Path, tmp_path: Path) -> None:
    with served(world, tmp_path, seconds=0.2) as service:
        with service.client() as client:
            config = (world / "config.yaml").read_text()
            for name in ("runs", "waits"):
                client.submit(config, folder=str(world), changes=[f"name={name}"])
        pid = service.driver("runs")
        service.wait_for_outcomes("runs", 2)
        second = evomerge(world, "serve", "--port", "0", "--folder", service.state, "--store", service.store)
        assert (second.returncode, "serves it already" in second.stderr) == (2, True)
        service.kill()
        service.wait_for_outcomes("runs", 5)  # the driver goes on without it
        service.start()
        with service.client() as client:
            assert {line["name"]: line["status"] for line in client.runs()} == {
                "waits": "queued",
                "runs": "running",
            }
            client.cancel("waits")
        assert service.started("runs") == [pid]
        os.kill(pid, signal.SIGKILL)
        assert service.wait_for_status("runs", "finished")["evaluations"] == 12
        assert len(service.started("runs")) == 2


def test_a_driver_that_always_dies_is_given_up(world: Path, tmp_path: Path) -> None:
    write_config(world, "deadly.yaml", name="deadly", fitness={"function": "fitness.py:deadly"})
    with served(world, tmp_path, "--restarts", "0", seconds=0.0) as service:
        assert service.command("submit", "deadly.yaml").returncode == 0
        shown = service.wait_for_status("deadly", "interrupted")
        assert "drivers that died in a row without a new outcome: 1" in shown["error"]
        assert len(service.started("deadly")) == 2  # the first brought outcomes


def test_the_service_says_what_is_wrong_in_one_line(world: Path, tmp_path: Path) -> None:
    def refused(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
        done = evomerge(world, *arguments, env=env, timeout=60)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        return done.stderr

    assert "name it with --server" in refused("submit", "config.yaml")
    nowhere = ("--server", "http://127.0.0.1:1")
    assert "no token" in refused("runs", *nowhere)
    assert "cannot be reached" in refused("runs", *nowhere, env={"EVOMERGE_TOKEN": "x" * 40})
    assert "expected http://" in refused("runs", "--server", "file:///x", env={"EVOMERGE_TOKEN": "x"})
    assert "not both" in refused("runs", *nowhere, "--store", "x.db", env={"EVOMERGE_TOKEN": "x"})
    assert "no such folder" in refused("serve", "--root", "nothing")
    place = ("--folder", tmp_path / "s", "--store", tmp_path / "r.db")
    assert "cannot listen there" in refused("serve", *place, "--host", "203.0.113.7")
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "token").write_text("x" * 43)
    (tmp_path / "s" / "token").chmod(0o644)
    assert "chmod 600" in refused("serve", *place)
    code = (
        "import sys; sys.modules['uvicorn'] = None; from evomerge.cli import main; "
        f"sys.argv = ['evomerge', 'serve', '--folder', {str(tmp_path / 't')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "evomerge: serve: the package uvicorn is missing; pip install 'evomerge[service]'\n",
    )
