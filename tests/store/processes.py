"""Programs that the tests run in other processes: `python -m tests.store.processes PROGRAM URL RUN`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from evomerge.errors import StoreError
from evomerge.records import Candidate, Outcome, TaskScore
from evomerge.store import Run, Snapshot, Store

GENERATION = 4


def start(program: str, url: str, name: str) -> subprocess.Popen[str]:
    """Start one of the programs below in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store.processes", program, url, name],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def make_candidate(number: int) -> Candidate:
    """Return a candidate that depends on its number only."""
    genome = (number / 3, -0.0, 1e-300 * (number + 1))
    recipe = {"method": "linear", "weights": [0.1 * number, 1 - 0.1 * number]}
    return Candidate(number, "optimizer", number // GENERATION, number, genome, recipe, f"d{number}")


def make_outcome(number: int, documents: str = "search") -> Outcome:
    """Return an outcome that depends on its candidate only."""
    values = {"task": tuple(number / (place + 3) for place in range(20))}
    tasks = {"task": TaskScore(number / 7, 0.01)}
    return Outcome(number, documents, "ok", number / 7, 0.01, tasks, values, cost={"total": 0.5})


def advance(run: Run, say: list[str] | None = None) -> None:
    """Do one generation from wherever the run was stopped; report each acknowledged write at once."""

    def acknowledge(line: str) -> None:
        if say is None:
            print(line, flush=True)
        else:
            say.append(line)

    snapshot = run.latest_snapshot()
    told = snapshot.told if snapshot else 0
    log = run.log(snapshot)
    assert not log.told, "told outcomes without their snapshot"
    asked = {entry.candidate.number for entry in log.asked}
    waiting = {outcome.candidate for outcome in log.waiting}
    numbers = range(told, told + GENERATION)
    for number in numbers:
        if number not in asked:
            run.add_candidate(make_candidate(number), told)
            acknowledge(f"candidate {number}")
        if number not in waiting:
            run.add_outcome(make_outcome(number), "f")
            acknowledge(f"outcome {number}")
    state = {"mean": [told / 3] * 50}
    run.tell(numbers, "search", Snapshot(told + GENERATION, told + GENERATION, state))
    acknowledge(f"told {told + GENERATION}")


def write(url: str, name: str) -> None:
    """Drive the run until killed."""
    run = Store.open(url).take_run(name)
    while True:
        advance(run)


def hold(url: str, name: str) -> None:
    """Take the run and keep it until standard input ends."""
    run = Store.open(url).take_run(name)
    print(f"epoch {run.epoch}", flush=True)
    sys.stdin.read()


def claim(url: str, name: str) -> None:
    """Try to take the run when told to, say whether it worked, live on until standard input ends."""
    store = Store.open(url)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(f"won {store.take_run(name).epoch}", flush=True)
    except StoreError as error:
        print(f"lost {error}", flush=True)
    sys.stdin.read()


def read(url: str, name: str) -> None:
    """Read the run for two seconds, then say how often."""
    store = Store.open(url, create=False)
    print("ready", flush=True)
    reads, stop = 0, time.monotonic() + 2
    while time.monotonic() < stop:
        log = store.run(name).log()
        assert [outcome.candidate for outcome in log.told] == list(range(len(log.told)))
        assert len(log.told) % GENERATION == 0, "half a generation was told"
        reads += 1
    print(f"reads {reads}", flush=True)


if __name__ == "__main__":
    {"write": write, "hold": hold, "claim": claim, "read": read}[sys.argv[1]](*sys.argv[2:])
