"""Runs whose workers are processes of a Ray of their own: they equal runs without, and survive kills."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.test_niches import SEGMENTS, population, replayed
from tests.e2e.test_resume import SLOW
from tests.e2e.world import (
    TASKS,
    evomerge,
    evomerge_anew,
    history,
    make_world,
    outcomes_in,
    start_anew,
    wait_for_outcomes,
    write_config,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_ray_workers_give_the_same_run_and_survive_a_kill(world: Path, tmp_path: Path) -> None:
    """Two workers, tasks as fitness: killed with its Ray, resumed with one worker, equal to inline."""
    write_config(
        world, "ray.yaml", name="ray", fitness=TASKS, workers={"pool": "ray", "count": 2, "threads": 1}
    )
    inline, killed = str(tmp_path / "inline.db"), str(tmp_path / "killed.db")
    done = evomerge(world, "run", "ray.yaml", "--store", inline, "--set", "workers.pool=inline")
    assert done.returncode == 0, done.stderr
    process = start_anew(world, "run", "ray.yaml", "--store", killed)
    assert wait_for_outcomes(process, killed, "ray", 9), process.stderr.read()
    process.kill()
    process.wait()
    assert outcomes_in(killed, "ray") >= 9
    done = evomerge_anew(world, "resume", "ray", "--store", killed, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert history(killed, "ray") == history(inline, "ray")


def test_two_workers_are_recorded_in_order_of_arrival_and_resumed(world: Path, tmp_path: Path) -> None:
    write_config(
        world, "two.yaml", **{**SEGMENTS, "name": "two"}, workers={"pool": "ray", "count": 2, "threads": 1}
    )
    store = str(tmp_path / "two.db")
    process = start_anew(world, "run", "two.yaml", "--store", store, env=SLOW)
    assert wait_for_outcomes(process, store, "two", 14), process.stderr.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = history(store, "two")
    done = evomerge(world, "resume", "two", "--store", store, "--set", "workers.pool=inline")
    assert done.returncode == 0, done.stderr
    after = history(store, "two")
    assert after["candidates"][: len(before["candidates"])] == before["candidates"]
    assert after["status"] == "finished"
    living = {one["candidate"] for one in population(world, "two", store)["individuals"]}
    assert living == replayed(world, store, "two")
