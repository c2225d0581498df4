"""Wall clocks that jump, in the driver and in the database."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.store import Store
from tests.e2e.world import start_anew, wait_for_outcomes
from tests.faults.histories import whole_history
from tests.faults.killing import finished, one_line
from tests.nursery import Nursery
from tests.store.load import sql

NAME = "cma_es-parameter"
DAY = 86_400

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

/* Adds what stands in a file to the wall clock; the monotonic one stays as it is. */
static long jump(void) {
    FILE *file = fopen(getenv("CLOCK_FILE"), "r");
    long seconds = 0;
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t which, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(which, out);
    if (which == CLOCK_REALTIME) out->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *out, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(out, zone);
    out->tv_sec += jump();
    return code;
}
time_t time(time_t *out) {
    struct timeval now;
    gettimeofday(&now, NULL);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def whole(undisturbed: Any) -> dict[str, Any]:
    history: dict[str, Any] = undisturbed.made("cma_es", "parameter")[1]
    return history


@pytest.mark.long
@pytest.mark.promise("clock jumps")
def test_a_wall_clock_that_jumps_by_days_changes_nothing(
    world: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a clock that jumps")
    source, library, clock = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "jump"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clock.write_text("0")
    store = tmp_path / "store.db"
    env = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(clock), "FITNESS_SECONDS": "0.1"}
    process = start_anew(world, "run", f"{NAME}.yaml", "--store", store, env=env)
    for outcomes, jump in ((4, DAY), (8, -DAY), (12, 2 * DAY)):
        assert wait_for_outcomes(process, store, NAME, outcomes)
        clock.write_text(str(jump))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert whole_history(store, NAME) == whole
    with Store.open(store) as opened:
        times = [event.at for event in opened.run(NAME).events()]
    assert max(times) - min(times) > DAY, "the clock did not jump"


@pytest.mark.promise("clock jumps")
@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_living_driver_keeps_its_run_when_the_clock_jumps_and_a_dead_one_does_not(
    jump: int, whole: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    store = tmp_path / "store.db"
    gate = tmp_path / "gate"
    gate.mkdir()
    pid = nursery.start("run", f"{NAME}.yaml", "--store", str(store), env={"FITNESS_GATE": f"{gate}:7"})
    while not (gate / "reached").exists():
        time.sleep(0.01)
    with Store.open(store) as opened:
        # As the database sees it after its clock jumped.
        sql(opened, "UPDATE runs SET heartbeat = heartbeat - :jump", jump=jump)
    assert "is driven by process" in one_line(nursery.run("resume", NAME, "--store", store))
    (gate / "open").touch()
    finished(nursery.wait(pid))
    assert whole_history(store, NAME) == whole

    killed = tmp_path / "killed.db"
    assert nursery.run("run", f"{NAME}.yaml", "--store", killed, crash="tell_recorded:4").killed
    with Store.open(killed) as opened:
        sql(opened, "UPDATE runs SET heartbeat = heartbeat - :jump", jump=jump)
    finished(nursery.run("resume", NAME, "--store", killed))
    assert whole_history(killed, NAME) == whole
