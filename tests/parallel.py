"""A pytest plugin: how pytest-xdist (`-n`) spreads the tests over processes.

A file's tests stay together, because they share its fixtures. The files that take long come first, so that
all processes end at about the same time. All tests that start Ray are run by one process, one after another:
Ray's start takes a small machine whole, and tests look at its processes by their names.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

RAY = (
    "tests/e2e/test_cluster.py",
    "tests/e2e/test_ray.py",
    "tests/e2e/test_slurm.py",
    "tests/faults/test_cluster.py",
    "tests/security/test_ray.py",
    "tests/workers/test_ray_pool.py",
)
"""The files whose tests start Ray."""

LONG = (
    "tests/e2e/test_service.py",
    "tests/merging/test_thinned.py",
    "tests/faults/test_crash_points.py",
    "tests/faults/test_resume_equality.py",
    "tests/malformed/test_malformed.py",
    "tests/faults/test_stores.py",
    "tests/workers/test_vllm.py",
    "tests/workers/test_worker.py",
    "tests/e2e/test_resume.py",
    "tests/e2e/test_niches.py",
    "tests/optimizers/test_optuna_samplers.py",
    "tests/merging/test_loops.py",
    "tests/merging/test_merger.py",
    "tests/merging/test_stream.py",
    "tests/store/test_contract.py",
    "tests/fitness/test_harness.py",
    "tests/merging/test_spherical.py",
    "tests/optimizers/test_cma_es.py",
    "tests/merging/test_dataflow.py",
)
"""Files that take twenty seconds of a processor or more, the longest first; begun after those with Ray."""

MOST_WORKERS, WORKER_BYTES = 8, 3 * 2**30
"""How many processes `-n auto` starts at most, and the memory of the machine that each needs."""


def unit(name: str) -> str:
    """Return which tests stay in one process with the test of this name: its file, or all with Ray."""
    file = name.split("::")[0]
    return "ray" if file in RAY else file


def place(name: str) -> int:
    """Return how early a test comes: the place of its unit among those that take long."""
    order = ("ray", *LONG)
    return order.index(unit(name)) if unit(name) in order else len(order)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") and unit(item.nodeid) != "ray":
            raise pytest.UsageError(f"{item.nodeid}: its file starts Ray, name it in tests/parallel.py")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().total // WORKER_BYTES, MOST_WORKERS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    config.option.loadscopereorder = False  # the order of the files is ours
    return ByUnit(config, log)
