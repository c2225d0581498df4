"""Several nodes and PostgreSQL: nodes leave and join, drivers are killed, runs share, models are exported."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from evomerge.drive import make_pool
from evomerge.store import Store
from tests.contracts.pool import jobs_of, plan_of, run_all
from tests.e2e.world import evomerge, make_world, start_anew, wait_for_outcomes, write_config
from tests.postgres import PrivatePostgres

pytestmark = [pytest.mark.ray, pytest.mark.postgres]

FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 5,
}
"""How soon Ray takes a node for dead."""


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with PrivatePostgres() as url:
        yield url


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs and two nodes with one each; the nodes have a source cache."""
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="evo-", dir="/tmp"))  # the paths of Ray's sockets must be short
    (folder / "ray").mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", str(folder))
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    (folder / "token").write_text("0123456789abcdef" * 4)
    patch.setenv("FITNESS_SECONDS", "0.3")
    patch.setenv("EVOMERGE_SOURCE_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": FAST},
    )
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        for process in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(process.info["cmdline"] or []):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        patch.undo()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: Any) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    workers = {"pool": "ray", "ray_address": cluster.address, "threads": 1}
    write_config(folder, workers=workers, budget={"evaluations": 16, "finalists": 2})
    return folder


def eventually(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.1)


def workers_of(store: str, name: str) -> int:
    """Return how many workers the run's driver says it has."""
    with Store.open(store) as opened:
        found = opened.run(name).activity()
    return 0 if found is None else len(found[1]["workers"])


def test_a_run_outlives_nodes_and_drivers_and_is_exported(world: Path, store: str, cluster: Any) -> None:
    driver = start_anew(world, "run", "config.yaml", "--store", store)
    assert wait_for_outcomes(driver, store, "small", 4), driver.stderr.read()
    eventually(lambda: workers_of(store, "small") == 2)
    lost = cluster.list_all_nodes()[-1]
    cluster.remove_node(lost, allow_graceful=False)
    assert wait_for_outcomes(driver, store, "small", 9), driver.stderr.read()
    assert workers_of(store, "small") <= 2
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    cluster.add_node(num_cpus=1)
    resumed = evomerge(world, "resume", "small", "--store", store)
    assert resumed.returncode == 0, resumed.stderr
    with Store.open(store) as opened:
        run = opened.run("small")
        assert (run.status, run.epoch) == ("finished", 2)
        assert {outcome.status for outcome in run.outcomes()} == {"ok"}
        assert sum(candidate.origin == "optimizer" for candidate in run.candidates()) == 16
        fingerprints = {source["fingerprint"] for source in run.facts["sources"].values()}
    cache = Path(os.environ["EVOMERGE_SOURCE_CACHE"])
    assert {path.name for path in cache.iterdir() if path.is_dir()} == fingerprints
    exported = evomerge(world, "export", "small", "model", "--store", store)
    assert exported.returncode == 0, exported.stderr
    assert (world / "model" / "model.safetensors").is_file()


def test_runs_that_take_all_share_equally_and_take_back(world: Path, store: str) -> None:
    many = ("--set", "budget.evaluations=1000", "--set", "output.report=false")
    first = start_anew(world, "run", "config.yaml", "--name", "first", "--store", store, *many)
    try:
        assert wait_for_outcomes(first, store, "first", 2), first.stderr.read()
        eventually(lambda: workers_of(store, "first") == 2)
        plan = plan_of(world)
        with make_pool(plan) as second:  # it waits until the first run has given up a worker
            outcomes = run_all(second, jobs_of(plan, 3))
            assert [outcome.status for outcome in outcomes] == ["ok"] * 3
            assert second.state().workers == 1
            eventually(lambda: workers_of(store, "first") == 1)
        eventually(lambda: workers_of(store, "first") == 2)
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 130
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_a_run_takes_at_most_its_count(world: Path, store: str) -> None:
    plan = plan_of(world, "workers.count=1")
    with make_pool(plan) as pool:
        run_all(pool, jobs_of(plan, 3))
        assert len(pool.workers_now()) == 1
