"""What a long run takes stays flat: the short form; scripts/bench_long measures thousands of candidates."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import psutil

from evomerge.config import read_config
from evomerge.drive import start
from evomerge.progress import Progress
from evomerge.store import Store
from tests.e2e.world import make_world, write_config

MOST_BYTES = 12_000
"""Of memory that Python keeps for each candidate: genome, scores and cost, never its recipe or weights."""


def test_memory_files_and_threads_stay_flat(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    seen: dict[int, tuple[int, int, int]] = {}
    process = psutil.Process()

    def look(step: Progress) -> None:
        if step.phase == "search" and step.done in (60, 180):
            gc.collect()
            seen[step.done] = (tracemalloc.get_traced_memory()[0], process.num_fds(), process.num_threads())

    write_config(world, budget={"evaluations": 180, "finalists": 1})
    tracemalloc.start()
    try:
        with Store.open(world / "s.db") as store:
            start(read_config(world / "config.yaml"), world, store, listener=look)
    finally:
        tracemalloc.stop()
    assert seen[180][1] <= seen[60][1]
    assert seen[180][2] <= seen[60][2]
    assert (seen[180][0] - seen[60][0]) / 120 < MOST_BYTES
