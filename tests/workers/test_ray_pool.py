"""Workers as Ray actors: the contract, and what happens when they die, hang, or cannot start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.drive import make_pool
from evomerge.errors import UserError
from evomerge.workers.pool import Job, Pool
from tests.contracts.pool import PoolContract, jobs_of, plan_of, run_all
from tests.e2e.world import make_world

pytestmark = pytest.mark.ray

RAY = ("workers.pool=ray", "workers.count=2", "workers.threads=1")


@pytest.fixture(scope="module", autouse=True)
def one_ray_for_all() -> Iterator[None]:
    """Start Ray once: it takes seconds, and two starts at once fail on a small machine."""
    import ray

    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class TestRayPool(PoolContract):
    overrides = RAY


def workers_of(pool: Pool) -> list[int]:
    """Return the process ids of a Ray pool's actors."""
    return [process.pid for process in psutil.Process().children(recursive=True) if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::_Actor" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_each_worker_has_its_next_job_at_hand(tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = plan_of(make_world(tmp_path_factory.mktemp("world")), *RAY)
    with make_pool(plan) as pool:
        run_all(pool, jobs_of(plan, 4))
        assert pool.state().workers == 2
        for free, job in zip((4, 3, 2, 1), jobs_of(plan, 4), strict=True):
            assert pool.free() == free
            pool.submit(job)
        assert pool.free() == 0
        assert pool.state().running == 2


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def test_a_killed_worker_costs_a_retry_and_is_replaced(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(world, *RAY)
    with make_pool(plan) as pool:
        run_all(pool, jobs_of(plan, 2))
        for pid in workers_of(pool):
            os.kill(pid, signal.SIGKILL)
        outcomes = run_all(pool, jobs_of(plan, 6))
        assert all(o.status == "ok" for o in outcomes)
        assert pool.state().deaths >= 2
        assert pool.state().workers == 2


def test_a_candidate_that_kills_its_worker_fails_after_its_retries_and_the_rest_goes_on(world: Path) -> None:
    plan = plan_of(world, *RAY, "fitness.function=fitness.py:deadly", "workers.retries=1")
    with make_pool(plan) as pool:
        good = jobs_of(plan, 3)
        deadly = Job(9, {**good[0].recipe, "parameters": {"lambda": 0.6}}, "search", 60.0)
        outcomes = {o.candidate: o for o in run_all(pool, [deadly, *good])}
    assert outcomes[9].status == "failed"
    assert "tried 2 times" in outcomes[9].reason
    assert all(outcomes[i].status == "ok" for i in range(3))


def test_a_hanging_candidate_is_killed_at_its_deadline_and_tried_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "hung"
    fitness = (world / "fitness.py").read_text().replace('os.environ["HANG_MARKER"]', repr(str(marker)))
    (world / "fitness.py").write_text(fitness)
    plan = plan_of(world, *RAY, "fitness.function=fitness.py:hang_once")
    with make_pool(plan) as pool:
        jobs = [Job(j.candidate, j.recipe, j.documents, 8.0) for j in jobs_of(plan, 3)]
        outcomes = run_all(pool, jobs)
        assert pool.state().deaths >= 1
    assert marker.exists()
    assert [o.status for o in outcomes] == ["ok"] * 3
    assert max(o.cost.get("attempts", 1) for o in outcomes) == 2


def test_more_workers_than_the_machine_holds_are_refused_in_one_line(world: Path) -> None:
    plan = plan_of(world, "workers.pool=ray", "workers.count=64")
    with pytest.raises(UserError, match=r"workers.count: 64 workers do not fit .* at most \d+") as raised:
        make_pool(plan).start()
    assert "\n" not in str(raised.value)


def test_resources_that_no_machine_has_are_refused_at_once(world: Path) -> None:
    plan = plan_of(world, "workers.pool=ray", "workers.resources={unobtainium: 1}")
    with pytest.raises(UserError, match="1 unobtainium"):
        make_pool(plan).start()


def test_a_source_with_nan_is_refused_before_anything_is_scored(world: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = world / "two" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=f'{name}" holds NaN'):
        make_pool(plan_of(world, *RAY)).start()


def test_a_fitness_that_cannot_be_imported_is_refused_in_one_line(world: Path) -> None:
    plan = plan_of(world, *RAY, "fitness.function=no_such_module:score")
    with pytest.raises(UserError, match="fitness.function: no_such_module:score"):
        make_pool(plan).start()


def test_closing_leaves_no_worker_behind(world: Path) -> None:
    plan = plan_of(world, *RAY)
    pool = make_pool(plan)
    pool.start()
    assert workers_of(pool)
    pool.close(kill=True)
    pool.close()
    end = time.monotonic() + 30
    while workers_of(pool) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers_of(pool) == []


def test_a_source_that_is_cut_off_while_it_is_mapped_stops_the_run_with_its_name(world: Path) -> None:
    """Reading behind the new end kills a worker (SIGBUS); the one that takes its place says what is wrong."""
    plan = plan_of(world, *RAY, "workers.count=1", "workers.memory_gib=0.000001")
    with make_pool(plan) as pool:
        run_all(pool, jobs_of(plan, 2))
        os.truncate(world / "two" / "model.safetensors", 3000)
        with pytest.raises(UserError, match=r"two/model.safetensors: cut off"):
            run_all(pool, jobs_of(plan, 4))
        assert pool.state().deaths >= 1
