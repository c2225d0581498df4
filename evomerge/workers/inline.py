"""The reference pool: one worker in this process, one job at a time."""

from __future__ import annotations

import importlib
import time
from collections import deque
from typing import TYPE_CHECKING

from evomerge.records import Outcome
from evomerge.workers.pool import Job, Pool, PoolState, WorkerNow
from evomerge.workers.settings import WorkerSpec

if TYPE_CHECKING:
    from evomerge.workers.worker import Worker


class InlinePool(Pool):
    """Runs each job when its outcome is waited for. A deadline cannot end a job here.

    Args:
        spec: What the worker loads.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: Worker | None = None
        self._jobs: deque[Job] = deque()
        self._since = 0.0

    def start(self) -> None:
        """Load the worker, and with it torch."""
        module = importlib.import_module("evomerge.workers.worker")
        self._worker = module.Worker(self._spec)

    def free(self) -> int:
        """Return 1 while nothing waits."""
        return 1 - len(self._jobs) if self._worker else 0

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)
        self._since = time.time()

    def withdraw(self) -> int:
        """Forget the job that waits."""
        count = len(self._jobs)
        self._jobs.clear()
        return count

    def wait(self, timeout: float) -> list[Outcome]:
        """Run the oldest job."""
        if not self._jobs or self._worker is None:
            return []
        return [self._worker.run(self._jobs.popleft())]

    def state(self) -> PoolState:
        """Return one worker, idle between calls."""
        return PoolState(workers=1 if self._worker else 0, running=len(self._jobs), deaths=0)

    def workers_now(self) -> list[WorkerNow]:
        """Return the worker with the job that it will run at once."""
        if self._worker is None:
            return []
        if not self._jobs:
            return [WorkerNow(0, "idle")]
        return [WorkerNow(0, "busy", self._jobs[0].candidate, self._jobs[0].documents, self._since)]

    def close(self, *, kill: bool = False) -> None:
        """Forget the worker."""
        self._worker = None
        self._jobs.clear()
