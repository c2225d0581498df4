"""Local drivers: found again by whoever looks, alone in their folder, and ended with all they started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.service.launcher import Driver, LocalLauncher, complaints
from evomerge.store import Store


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """A command that goes on until the fixture ends: it watches a run that this process drives."""
    where = tmp_path / "runs.db"
    with Store.open(where) as store:
        run = store.create_run("r", {}, {})
        yield ("watch", "r", "--store", str(where), "--interval", "0.2")
        run.release("stopped")


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver("d-1", tmp_path / "job")


def test_a_driver_lives_until_it_ends_and_says_why(driver: Driver) -> None:
    launcher = LocalLauncher()
    assert not launcher.alive(driver)
    handle = launcher.start(driver, ["run", "nothing.yaml"], {})
    started = Driver(driver.name, driver.folder, handle)
    wait_for(lambda: not launcher.alive(started))
    assert launcher.complaint(started) == "nothing.yaml: cannot be read (No such file or directory)"
    again = Driver(driver.name, driver.folder, launcher.start(driver, ["schema"], {}))
    wait_for(lambda: not launcher.alive(again))
    assert launcher.complaint(again) == ""  # the log of the one before is not its own
    assert "nothing.yaml" in launcher.log(started, 10_000)
    assert launcher.complaint(driver) == ""  # a handle that was never recorded: perhaps another's complaint


def test_what_a_command_complains_of_are_its_last_lines() -> None:
    said = ["evomerge: a", "a note", "evomerge: b", "evomerge: c"]
    assert complaints(said) == ["b", "c"]
    assert complaints([*said, "Killed"]) == []


def test_another_service_finds_it_by_its_folder_alone(driver: Driver, watched: tuple[str, ...]) -> None:
    first = LocalLauncher()
    handle = first.start(driver, watched, {})
    second = LocalLauncher()
    assert second.alive(driver)  # without its handle
    with pytest.raises(UserError, match="has a living driver already"):
        second.start(driver, watched, {})
    second.stop(Driver(driver.name, driver.folder, handle))
    wait_for(lambda: not first.alive(driver))
    assert not second.alive(driver)
    assert second.complaint(Driver(driver.name, driver.folder, handle)) == ""


def test_it_has_a_session_of_its_own_and_no_secrets(
    driver: Driver, watched: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_TOKEN", "secret")
    launcher = LocalLauncher()
    handle = launcher.start(driver, watched, {"GIVEN": "1"})
    pid = handle["pid"]
    try:
        assert os.getsid(pid) == pid
        place = Path(f"/proc/{pid}/environ")
        wait_for(lambda: place.read_bytes() != b"")  # as it is for a moment while the program is loaded
        environment = place.read_bytes().split(b"\0")
        assert b"GIVEN=1" in environment
        assert not any(line.startswith(b"EVOMERGE_TOKEN") for line in environment)
    finally:
        launcher.stop(Driver(driver.name, driver.folder, handle), kill=True)
    wait_for(lambda: not launcher.alive(driver))


def test_one_that_was_killed_is_dead_though_nobody_waited(driver: Driver, watched: tuple[str, ...]) -> None:
    handle = LocalLauncher().start(driver, watched, {})
    other = LocalLauncher()
    os.kill(handle["pid"], signal.SIGKILL)
    wait_for(lambda: not other.alive(driver))
    other.stop(Driver(driver.name, driver.folder, handle))  # signals nobody
