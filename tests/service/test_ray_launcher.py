"""Drivers as Ray jobs, on a stand-in for Ray's job interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.service.launcher import Driver
from evomerge.service.ray_launcher import RayLauncher
from evomerge.store import Store
from tests.fakes.ray_jobs import RayJobs, ray_jobs


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def cluster() -> Iterator[RayJobs]:
    with ray_jobs() as cluster:
        yield cluster


@pytest.mark.parametrize("address", ["head", "head:8265", "ray://head:10001", "http://", "http://head/x"])
def test_an_address_that_is_none_is_refused_at_the_start(address: str) -> None:
    with pytest.raises(UserError, match=r"expected http://HOST:8265, the cluster's dashboard"):
        RayLauncher(address)


def test_a_job_says_why_it_failed(cluster: RayJobs, tmp_path: Path) -> None:
    launcher = RayLauncher(cluster.address)
    driver = Driver("evomerge-x-1-1", tmp_path)
    assert not launcher.alive(driver)
    assert launcher.log(driver, 100) == ""
    config = tmp_path / "it's a $(touch file).yaml"
    started = Driver(driver.name, tmp_path, launcher.start(driver, ["run", str(config)], {"GIVEN": "1"}))
    wait_for(lambda: not launcher.alive(driver))
    assert launcher.complaint(started) == f"{config}: cannot be read (No such file or directory)"
    assert cluster.submitted[0]["runtime_env"]["env_vars"]["GIVEN"] == "1"


def test_it_is_submitted_once_and_found_by_its_name(cluster: RayJobs, tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs.db") as store:
        run = store.create_run("r", {}, {})
        watch = ["watch", "r", "--store", str(tmp_path / "runs.db"), "--interval", "0.2"]
        driver = Driver("evomerge-x-1-1", tmp_path)
        handle = RayLauncher(cluster.address).start(driver, watch, {})
        other = RayLauncher(cluster.address)
        assert other.alive(driver)
        assert other.start(driver, watch, {}) == handle
        assert len(cluster.submitted) == 1
        other.stop(driver)
        wait_for(lambda: not other.alive(driver))
        run.release("stopped")


def test_a_cluster_that_does_not_answer_is_no_dead_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver("evomerge-x-1-1", tmp_path)
    with pytest.raises(UserError, match=r"--ray-address http://127\.0\.0\.1:1: cannot be reached"):
        RayLauncher("http://127.0.0.1:1/").alive(driver)
    with ray_jobs("secret") as cluster:
        with pytest.raises(UserError, match="was answered 401: Unauthorized"):
            RayLauncher(cluster.address).alive(driver)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert not RayLauncher(cluster.address).alive(driver)
