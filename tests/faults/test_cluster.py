"""What can happen to workers, nodes and Ray itself."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from evomerge import crew, drive
from evomerge.config import read_config
from evomerge.plan import Plan
from evomerge.progress import Progress
from evomerge.store import Store
from evomerge.workers.pool import Job
from tests.contracts.pool import run_all
from tests.e2e.world import start, write_config
from tests.faults.histories import whole_history, without_order
from tests.faults.killing import finished
from tests.faults.nursery import Nursery
from tests.faults.promises import Book

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
"""A node that does not answer is dead after a second or two, not after a minute."""


@contextmanager
def own_folder() -> Iterator[None]:
    """Let Ray put its files into a folder that goes away."""
    folder = tempfile.mkdtemp(prefix="evomerge-test-", dir="/tmp")
    (Path(folder) / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for workers; nodes come and go."""
    import ray
    from ray.cluster_utils import Cluster

    with own_folder():
        made = Cluster(
            initialize_head=True,
            connect=True,
            head_node_args={"num_cpus": 0, "_system_config": FAST, "include_dashboard": False},
        )
        yield made
        ray.shutdown()
        made.shutdown()


def raylet_of(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@dataclass
class Steer:
    """Leads a steered fitness, every evaluation of which waits until it is let go."""

    folder: Path

    def held(self) -> list[int]:
        """Return the processes whose evaluation waits, the oldest first."""
        marks = sorted(self.folder.glob("held-*"), key=lambda mark: mark.stat().st_mtime_ns)
        pids = [int(mark.name.removeprefix("held-")) for mark in marks]
        return [pid for pid in pids if psutil.pid_exists(pid)]

    def one(self) -> tuple[int, str]:
        """Wait until an evaluation waits; return its process and what it evaluates."""
        until(self.held, "an evaluation that waits")
        return self.held()[0], self.evaluated(self.held()[0])

    def evaluated(self, pid: int) -> str:
        return [" ".join(words[1:3]) for words in self.log() if words[3] == str(pid)][-1]

    def waiting(self, what: str, but: int) -> list[int]:
        """Return the processes, but for one, that wait with an evaluation."""
        return [pid for pid in self.held() if pid != but and self.evaluated(pid) == what]

    def let_go(self, pid: int) -> None:
        (self.folder / f"go-{pid}").touch()

    def run(self) -> None:
        """Let everything go."""
        (self.folder / "run").touch()

    def log(self) -> list[list[str]]:
        """Return all evaluations' beginnings and ends: word, recipe, split, process."""
        text = (self.folder / "log").read_text() if (self.folder / "log").exists() else ""
        return [line.split() for line in text.split("\n")[:-1]]

    def count(self, word: str, what: str) -> int:
        return sum(words[0] == word and " ".join(words[1:3]) == what for words in self.log())

    def again(self, what: str, times: int = 2) -> None:
        """Wait until an evaluation was begun so often."""
        until(lambda: self.count("begin", what) >= times, f"another try of {what}")

    @property
    def repeated(self) -> int:
        begun = [" ".join(words[1:3]) for words in self.log() if words[0] == "begin"]
        return len(begun) - len(set(begun))


def until(holds: Callable[[], Any], what: str, seconds: float = 120.0) -> float:
    """Wait for something; return how long it took."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"no {what} within {seconds:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - began


class Driver:
    """A driver in a thread of this process."""

    def __init__(self, world: Path, store: Path, *overrides: str) -> None:
        self.workers = 0
        self.said: list[str] = []
        self.error: BaseException | None = None
        self.store = store
        config = read_config(world / "steered.yaml", overrides)

        def work() -> None:
            try:
                with Store.open(store) as opened:
                    drive.start(config, world, opened, listener=self._listen, notice=self.said.append)
            except BaseException as problem:
                self.error = problem

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def _listen(self, step: Progress) -> None:
        self.workers = step.workers

    def end(self) -> None:
        self._thread.join(240)
        if self.error is not None:
            raise self.error
        assert not self._thread.is_alive()

    def losses(self) -> list[str]:
        with Store.open(self.store) as opened:
            events = opened.run("steered").events()
        return [str(event.data["reason"]) for event in events if event.kind == "workers_lost"]

    def detected(self, losses: int) -> float:
        """Wait until so many losses are recorded; return how long it took."""
        return until(lambda: len(self.losses()) > losses, "loss of a worker")


@pytest.fixture
def steer(world: Path) -> Steer:
    folder = world / "steer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Steer(folder)


@pytest.fixture(scope="module")
def steered(world: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run, with one worker inline."""
    write_config(
        world,
        "steered.yaml",
        name="steered",
        fitness={"function": "steered.py:steered"},
        budget={"evaluations": 24, "finalists": 2},
        baselines={"task_arithmetic": [0.3]},
    )
    (world / "steer").mkdir(exist_ok=True)
    (world / "steer" / "run").touch()
    store = tmp_path_factory.mktemp("steered") / "store.db"
    finished(nursery.run("run", "steered.yaml", "--store", store))
    return whole_history(store, "steered")


def on(cluster: Any, **more: Any) -> tuple[str, ...]:
    settings = {"pool": "ray", "count": 2, "threads": 1, "ray_address": cluster.address, **more}
    return tuple(f"workers.{key}={value}" for key, value in settings.items())


DEADLINE = 12.0


def node_of(pid: int, nodes: list[Any]) -> Any:
    """Return the node on which a worker runs."""
    return next(node for node in nodes if psutil.Process(pid).parent() == raylet_of(node))


def test_one_run_through_everything_that_happens_to_workers_and_nodes(
    cluster: Any,
    world: Path,
    steered: dict[str, Any],
    steer: Steer,
    tmp_path: Path,
    book: Book,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew, "ALONE_SECONDS", 0.5)
    nodes = [cluster.add_node(num_cpus=1)]
    driver = Driver(world, tmp_path / "store.db", *on(cluster))
    steer.one()
    with book.trying("node joins"):
        began = time.monotonic()
        nodes.append(cluster.add_node(num_cpus=1))
        until(lambda: len(steer.held()) == 2, "second worker")
        book.report("node joins", recover=time.monotonic() - began)
    nodes.append(cluster.add_node(num_cpus=1))

    with book.trying("worker killed"):
        pid, what = steer.one()
        before, began = len(driver.losses()), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        detect = driver.detected(before)
        steer.again(what)
        recover = time.monotonic() - began
        book.report("worker killed", kills=1, repeated=1, detect=detect, recover=recover)

    with book.trying("raylet killed"):
        pid, what = steer.one()
        node = node_of(pid, nodes)
        nodes.remove(node)
        before, began = len(driver.losses()), time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
        driver.detected(before)
        detect = time.monotonic() - began
        steer.again(what)
        recover = time.monotonic() - began
        book.report("raylet killed", kills=1, repeated=1, detect=detect, recover=recover)

    nodes.append(cluster.add_node(num_cpus=1))
    with book.trying("raylet frozen"):
        pid, what = steer.one()
        node = node_of(pid, nodes)
        nodes.remove(node)
        before = len(driver.losses())
        raylet_of(node).suspend()
        detect = driver.detected(before)
        steer.again(what)
        until(lambda: steer.waiting(what, pid), "second try that waits")
        (other,) = steer.waiting(what, pid)
        steer.let_go(other)
        until(lambda: steer.count("end", what) == 1, "end of the second try")
        (steer.folder / f"poison-{pid}").touch()
        steer.let_go(pid)
        until(lambda: steer.count("end", what) == 2, "late result")
        raylet_of(node).resume()
        time.sleep(0.5)
        with Store.open(driver.store) as opened:
            scores = [o.score for o in opened.run("steered").outcomes() if o.score is not None]
        taken = sum(score < -500 for score in scores)
        book.report(
            "raylet frozen", repeated=1, detect=detect, late_results_offered=1, late_results_taken=taken
        )
        assert taken == 0
    cluster.remove_node(node, allow_graceful=False)

    with book.trying("node leaves"):
        until(lambda: len([pid for pid in steer.held() if alive(pid)]) == 2, "both workers")
        left = [steer.evaluated(pid) for pid in steer.held()]
        before, began = len(driver.losses()), time.monotonic()
        for node in nodes:
            cluster.remove_node(node, allow_graceful=True)
        driver.detected(before)
        detect = time.monotonic() - began
        until(lambda: any("no worker is up: waiting" in line for line in driver.said), "word that it waits")
        node = cluster.add_node(num_cpus=1)
        steer.run()
        for what in left:
            steer.again(what)
        book.report("node leaves", repeated=2, detect=detect)

    driver.end()
    found = whole_history(driver.store, "steered")
    assert without_order(found) == without_order(steered)
    assert steer.repeated == 5
    cluster.remove_node(node, allow_graceful=True)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
def test_candidates_that_break_their_worker_cost_only_themselves(
    cluster: Any, world: Path, steered: dict[str, Any], steer: Steer, book: Book
) -> None:
    node = cluster.add_node(num_cpus=1)
    overrides = (*on(cluster, count=1, retries=1), "fitness.function=steered.py:misbehaving")
    plan = Plan(read_config(world / "steered.yaml", overrides), world)
    kinds = {"segfault": 0.1, "exit": 0.2, "memory": 0.4, "hang": 0.5, "freeze": 0.6, "good": 0.7}
    found, seconds, deaths = {}, {}, {}
    with drive.make_pool(plan) as pool:
        for number, (kind, strength) in enumerate(kinds.items()):
            recipe = {**plan.seeded[-1].recipe.to_json(), "parameters": {"lambda": strength}}
            began, before = time.monotonic(), pool.state().deaths
            (found[kind],) = run_all(pool, [Job(number, recipe, "search", DEADLINE)])
            seconds[kind] = time.monotonic() - began
            deaths[kind] = pool.state().deaths - before
    with book.trying("worker crashes"):
        assert found["segfault"].status == "failed"
        assert "the worker died" in found["segfault"].reason
        assert "tried 2 times" in found["segfault"].reason
        assert found["exit"].status != "failed"
        assert found["exit"].cost["attempts"] == 2
        book.report("worker crashes", kills=3)
    with book.trying("worker out of memory"):
        assert found["memory"].status == "failed"
        assert "MemoryError" in found["memory"].reason
    for kind in ("hang", "freeze"):
        with book.trying("worker hangs"):
            assert found[kind].status != "failed"
            assert found[kind].cost["attempts"] == 2
            book.report("worker hangs", kills=1, repeated=1, recover=seconds[kind] - DEADLINE)
    assert deaths == {"segfault": 2, "exit": 1, "memory": 0, "hang": 1, "freeze": 1, "good": 0}
    cluster.remove_node(node, allow_graceful=True)


# From here on without the cluster: a Ray of the driver's own.


def parts_of(process: Any, *names: str) -> list[psutil.Process]:
    """Return the processes of a driver's own Ray; without names all of them."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if not names or one.name() in names]


@pytest.mark.promise("ray killed")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("gcs_server",), marks=pytest.mark.long, id="gcs"),
        pytest.param(("raylet",), marks=pytest.mark.long, id="raylet"),
        pytest.param((), marks=pytest.mark.long, id="all"),
    ],
)
def test_a_ray_of_our_own_that_dies_is_started_again(
    names: tuple[str, ...], world: Path, steered: dict[str, Any], steer: Steer, tmp_path: Path, book: Book
) -> None:
    store = tmp_path / "store.db"
    overrides = [part for one in ("pool=ray", "count=2") for part in ("--set", f"workers.{one}")]
    process = start(world, "run", "steered.yaml", "--store", store, *overrides)
    try:
        worker, what = steer.one()
        killed = parts_of(process, *names)
        for part in killed:
            part.kill()
        began = time.monotonic()
        until(
            lambda: not alive(worker), "end of the worker"
        )  # let go earlier, its result might still come in
        steer.run()
        steer.again(what)
        recover = time.monotonic() - began
        _, err = process.communicate(timeout=200)
    except TimeoutError as error:
        process.send_signal(signal.SIGABRT)
        raise TimeoutError(f"{error}; {process.communicate()[1]}") from None
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    book.report("ray killed", kills=1, repeated=steer.repeated, recover=recover)
    assert without_order(whole_history(store, "steered")) == without_order(steered)
    assert steer.repeated <= 4  # two workers, each with one under way and one at hand
    assert_gone(killed)


@pytest.mark.long
@pytest.mark.promise("head killed")
def test_a_cluster_whose_head_dies_stops_the_run_in_one_line(
    world: Path, steered: dict[str, Any], steer: Steer, tmp_path: Path, book: Book, nursery: Nursery
) -> None:
    from ray.cluster_utils import Cluster

    store = tmp_path / "store.db"
    with own_folder():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        settings = ("pool=ray", "count=1", f"ray_address={made.address}")
        overrides = [part for one in settings for part in ("--set", f"workers.{one}")]
        process = start(world, "run", "steered.yaml", "--store", store, *overrides)
        try:
            steer.one()
            psutil.Process(made.head_node.all_processes["gcs_server"][0].process.pid).kill()
            began = time.monotonic()
            _, err = process.communicate(timeout=120)
            detect = time.monotonic() - began
        finally:
            process.kill()
            made.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    assert process.returncode == 2, err
    assert "Ray is gone" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    steer.run()
    finished(nursery.run("resume", "steered", "--store", store, "--set", "workers.pool=inline", timeout=200))
    book.report("head killed", kills=1, repeated=steer.repeated, detect=detect)
    assert without_order(whole_history(store, "steered")) == without_order(steered)
    assert steer.repeated <= 1


def assert_gone(processes: list[psutil.Process]) -> None:
    """Assert that no process is left but zombies of the test's own."""

    until(lambda: not any(alive(process.pid) for process in processes), "end of all processes", 30)


@pytest.mark.long
@pytest.mark.promise("driver killed")
@pytest.mark.parametrize("kill", range(8))
def test_a_driver_with_ray_that_is_killed_leaves_nothing_and_goes_on(
    kill: int,
    world: Path,
    steered: dict[str, Any],
    steer: Steer,
    tmp_path: Path,
    book: Book,
    nursery: Nursery,
) -> None:
    from evomerge.seeding import stream

    store = tmp_path / "store.db"
    overrides = [part for one in ("pool=ray", "count=2") for part in ("--set", f"workers.{one}")]
    process = start(world, "run", "steered.yaml", "--store", store, *overrides)
    steer.run()
    until(lambda: len(steer.log()) > 1, "first evaluation")
    time.sleep(float(stream(0, "driver killed", kill).uniform(0, 1.0)))
    parts = parts_of(process)
    process.kill()
    process.communicate()
    began = time.monotonic()
    done = finished(
        nursery.run("resume", "steered", "--store", store, "--set", "workers.pool=inline", timeout=200)
    )
    book.report("driver killed", kills=1, repeated=steer.repeated, recover=time.monotonic() - began)
    assert done.returncode == 0
    assert without_order(whole_history(store, "steered")) == without_order(steered)
    assert steer.repeated <= 4  # two workers, each with one under way and one at hand
    workers = [part for part in parts if not _agent(part)]
    assert_gone(workers)


def _agent(process: psutil.Process) -> bool:
    """Return whether it is one of Ray's own agents, which outlive their raylet where nobody reaps it."""
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False
