"""A pool of several workers in one process, whose answers come in another order than the questions."""

from __future__ import annotations

from evomerge.records import Outcome
from evomerge.seeding import stream
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Job
from evomerge.workers.settings import WorkerSpec


class ShuffledPool(InlinePool):
    """Holds two jobs for each worker, as the pool over Ray does, and answers one of them at random.

    Args:
        spec: What the workers load.
        workers: How many there seem to be.
    """

    def __init__(self, spec: WorkerSpec, workers: int) -> None:
        super().__init__(spec)
        self._count = workers
        self._answered = 0

    def free(self) -> int:
        return 2 * self._count - len(self._jobs) if self._worker else 0

    def wait(self, timeout: float) -> list[Outcome]:
        under_way = min(len(self._jobs), self._count)
        if under_way:
            place = int(stream(0, "shuffled", self._answered).integers(under_way))
            self._answered += 1
            self._jobs.rotate(-place)
            job: Job = self._jobs.popleft()
            self._jobs.rotate(place)
            self._jobs.appendleft(job)
        return super().wait(timeout)
