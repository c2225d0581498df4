"""Drivers that are told to stop, are frozen, or are not alone; and inputs that changed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.store import Store
from tests.e2e.world import TASKS, write_config
from tests.faults.histories import repeated, whole_history
from tests.faults.killing import finished, one_line
from tests.faults.promises import Book
from tests.faults.runs import make_fault_world
from tests.nursery import Nursery
from tests.store.load import other_host

NAME = "cma_es-parameter"


class Gate:
    """Holds a run at its n-th evaluation."""

    def __init__(self, folder: Path, number: int) -> None:
        folder.mkdir()
        self._folder = folder
        self.env = {"FITNESS_GATE": f"{folder}:{number}", "FITNESS_LOG": str(folder / "evaluations")}

    def wait(self) -> None:
        """Wait until the run is there."""
        end = time.monotonic() + 60
        while not (self._folder / "reached").exists():
            assert time.monotonic() < end, "the run did not come to its gate"
            time.sleep(0.01)

    def open(self) -> None:
        (self._folder / "open").touch()

    @property
    def repeated(self) -> int:
        return repeated(self._folder / "evaluations")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate", 9)


@pytest.fixture
def whole(undisturbed: Any) -> dict[str, Any]:
    history: dict[str, Any] = undisturbed.made("cma_es", "parameter")[1]
    return history


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_stops_the_run_after_the_candidate_that_is_running(
    number: signal.Signals, whole: dict[str, Any], nursery: Nursery, tmp_path: Path, gate: Gate
) -> None:
    store = tmp_path / "store.db"
    pid = nursery.start("run", f"{NAME}.yaml", "--store", str(store), env=gate.env)
    gate.wait()
    os.kill(pid, number)
    time.sleep(0.1)
    gate.open()
    done = nursery.wait(pid)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "stopping after the candidates that are running" in done.stderr
    with Store.open(store) as opened:
        assert opened.run(NAME).status == "stopped"
    finished(nursery.run("resume", NAME, "--store", store, env=gate.env | {"FITNESS_GATE": ""}))
    assert whole_history(store, NAME) == whole
    assert gate.repeated == 0


@pytest.mark.promise("signals")
def test_a_second_ctrl_c_stops_at_once(
    whole: dict[str, Any], nursery: Nursery, tmp_path: Path, gate: Gate
) -> None:
    store = tmp_path / "store.db"
    pid = nursery.start("run", f"{NAME}.yaml", "--store", str(store), env=gate.env)
    gate.wait()
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(pid, signal.SIGINT)
    done = nursery.wait(pid)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    finished(nursery.run("resume", NAME, "--store", store, env=gate.env | {"FITNESS_GATE": ""}))
    assert whole_history(store, NAME) == whole
    assert gate.repeated == 1


@pytest.mark.promise("signals")
def test_a_terminal_that_goes_away_stops_the_run_and_breaks_nothing(
    whole: dict[str, Any], nursery: Nursery, tmp_path: Path, gate: Gate
) -> None:
    store = tmp_path / "store.db"
    ours, theirs = os.openpty()
    pid = nursery.start(
        "run", f"{NAME}.yaml", "--store", str(store), env=gate.env, terminal=os.ttyname(theirs)
    )
    gate.wait()
    os.close(theirs)
    os.close(ours)
    time.sleep(0.1)
    gate.open()
    assert nursery.wait(pid).returncode > 0
    with Store.open(store) as opened:
        assert (opened.run(NAME).status, opened.run(NAME).error) == ("stopped", "")
    finished(nursery.run("resume", NAME, "--store", store))
    assert whole_history(store, NAME) == whole


@pytest.mark.promise("two drivers")
def test_of_several_that_resume_at_once_one_drives(
    whole: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    store = tmp_path / "store.db"
    assert nursery.run("run", f"{NAME}.yaml", "--store", store, crash="outcome_recorded:6").killed
    env = {"FITNESS_SECONDS": "0.1"}
    pids = [nursery.start("resume", NAME, "--store", str(store), env=env) for _ in range(4)]
    ended = [nursery.wait(pid) for pid in pids]
    assert sorted(done.returncode for done in ended) == [0, 2, 2, 2]
    for done in ended:
        if done.returncode:
            assert "is driven by process" in one_line(done)
    assert whole_history(store, NAME) == whole
    with Store.open(store) as opened:
        assert opened.run(NAME).epoch == 2


@pytest.mark.promise("two drivers")
def test_a_frozen_driver_that_wakes_up_after_another_took_its_run_writes_nothing(
    whole: dict[str, Any], nursery: Nursery, tmp_path: Path, gate: Gate, book: Book
) -> None:
    store = tmp_path / "store.db"
    frozen = nursery.start("run", f"{NAME}.yaml", "--store", str(store), env=gate.env)
    gate.wait()
    os.kill(frozen, signal.SIGSTOP)
    refused = nursery.run("resume", NAME, "--store", store)
    assert "is driven by process" in one_line(refused), "a frozen driver on this machine still has its run"
    with Store.open(store) as opened:
        other_host(opened, 70)  # as if it ran on a machine that was cut off for longer than its lease
    finished(nursery.run("resume", NAME, "--store", store))
    history = whole_history(store, NAME)
    assert history == whole
    gate.open()
    os.kill(frozen, signal.SIGCONT)
    done = nursery.wait(frozen)
    taken = sum(whole_history(store, NAME)[key] != history[key] for key in ("outcomes", "told"))
    book.report("two drivers", late_results_offered=1, late_results_taken=taken)
    assert done.returncode == 2
    assert "lost run cma_es-parameter: epoch 1, now 2" in one_line(done)
    assert taken == 0


@pytest.fixture
def other_world(tmp_path: Path) -> Path:
    return make_fault_world(tmp_path / "other")


@pytest.mark.promise("drift")
def test_changed_inputs_are_refused_with_both_fingerprints_until_accepted(
    nursery: Nursery, other_world: Path
) -> None:
    write_config(
        other_world, "drift.yaml", name="drift", fitness=TASKS, budget={"evaluations": 4, "finalists": 2}
    )
    store, config = other_world / "store.db", other_world / "drift.yaml"
    assert nursery.run("run", config, "--store", store, crash="tell_recorded:2").killed
    weights, task = other_world / "two" / "model.safetensors", other_world / "tasks" / "choice.yaml"
    changes = {
        weights: lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        task: lambda data: data.replace(b"{{q}}", b"Q: {{q}}"),
    }
    for changed, (path, change) in enumerate(changes.items(), 1):
        path.write_bytes(change(path.read_bytes()))
        refused = one_line(nursery.run("resume", "drift", "--store", store))
        before, now = refused.split("fingerprint ")[1].split(" at the start, ")
        assert before != now.split(" now")[0]
        assert ("source two" if path is weights else "the fitness (tasks") in refused
        assert "--accept-drift" in refused
        accepted = nursery.run("resume", "drift", "--store", store, "--accept-drift", crash="run_released")
        assert accepted.killed, accepted.stderr
        with Store.open(store) as opened:
            events = [event for event in opened.run("drift").events() if event.kind == "drift_accepted"]
            assert len(events) == changed
            assert "fingerprint" in events[-1].data["changes"][0]
            assert len(opened.run("drift").facts["drift"]) == changed
    finished(nursery.run("resume", "drift", "--store", store))


@pytest.mark.promise("drift")
def test_a_changed_fitness_file_is_refused(nursery: Nursery, other_world: Path) -> None:
    store = other_world / "store.db"
    config = write_config(other_world, "drift.yaml", name="drift", budget={"evaluations": 4, "finalists": 2})
    assert nursery.run("run", config, "--store", store, crash="tell_recorded:2").killed
    with (other_world / "fitness.py").open("a") as file:
        file.write("\n")
    refused = one_line(nursery.run("resume", "drift", "--store", store))
    assert "the fitness" in refused
    assert " at the start, " in refused
    finished(nursery.run("resume", "drift", "--store", store, "--accept-drift"))
