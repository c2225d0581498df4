"""Kill a run at moments, resume it to the end, and count what that cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.histories import lost, recorded, repeated, whole_history
from tests.faults.runs import write_pair
from tests.nursery import Done, Nursery


@dataclass
class Cost:
    """What kills cost: outcomes lost, evaluations begun again, seconds of the session that went on."""

    kills: int = 0
    lost: int = 0
    repeated: int = 0
    recover: float = 0.0


def finished(done: Done) -> Done:
    """Return what became of a command that must have worked."""
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done


class Undisturbed:
    """Runs that nobody disturbed, each made once."""

    def __init__(self, world: Path, nursery: Nursery) -> None:
        self._world, self._nursery = world, nursery
        self.made = cache(self._made)

    def _made(self, optimizer: str, space: str) -> tuple[str, dict[str, Any], int]:
        """Return a pair's run: its name, its history, and how many transitions it has."""
        name = write_pair(self._world, optimizer, space)
        store = self._world / f"{name}.db"
        done = finished(self._nursery.run("run", f"{name}.yaml", "--store", store, crash="any:0"))
        return name, whole_history(store, name), len(done.passed)


def one_line(done: Done) -> str:
    """Return the error of a command that the user can mend: the last line, exit code 2, no traceback."""
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("evomerge: ")] == lines[-1:], done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[-1]


def run_killed(
    nursery: Nursery,
    folder: Path,
    name: str,
    store: str,
    moments: Sequence[str],
    workers: Sequence[int | None] = (None,),
) -> Cost:
    """Run, die at each of the moments in turn, and go on to the end.

    Args:
        nursery: Where commands run.
        folder: The world.
        name: The run, whose config is `NAME.yaml`.
        store: Where it is kept.
        moments: As `evomerge.faults.arm` takes them, one for each session.
        workers: How many workers each session has, in turn; None: one, inline.

    Returns:
        What it cost. Moments that a session does not come to cost nothing.
    """
    log = folder / f"evaluations-{time.monotonic_ns()}"
    env = {"FITNESS_LOG": str(log)}
    cost = Cost()
    known: dict[tuple[int, str], dict[str, object]] = {}
    for session, moment in enumerate([*moments, None]):
        begun = f"{name}" in _runs(store)
        arguments = ("resume", name) if begun else ("run", f"{name}.yaml")
        done = nursery.run(
            *arguments, "--store", store, env=env, crash=moment, workers=workers[session % len(workers)]
        )
        if done.killed:
            cost.kills += 1
            cost.lost += lost(known, store, name)
            known = recorded(store, name)
            continue
        finished(done)
        cost.recover = max(cost.recover, done.seconds)
    cost.lost += lost(known, store, name)
    cost.repeated = repeated(log)
    log.unlink(missing_ok=True)
    return cost


def _runs(store: str) -> list[str]:
    from evomerge.store import Store

    if "://" not in store and not Path(store).exists():
        return []
    with Store.open(store) as opened:
        return [run.name for run in opened.runs()]
