"""The pool contract: jobs in, exactly one outcome for each out, in any order.

Retries are the pool's: a job whose worker died or hung is tried again on another, `retries` times, and
comes back as a failed outcome after that. A job whose worker answers is never repeated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.fitness.racing import Race
from evomerge.records import Outcome


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate to score on one document set.

    Attributes:
        candidate: The candidate's number.
        recipe: Its recipe as plain data.
        documents: The document set's key.
        deadline: Seconds after which its worker is taken to hang.
        race: What it is raced against; None: it is scored to the end.
    """

    candidate: int
    recipe: Mapping[str, Any]
    documents: str
    deadline: float
    race: Race | None = None


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool has at the moment.

    Attributes:
        workers: Workers that are up.
        running: Jobs that they work on.
        deaths: Workers lost so far.
        loss: Why the last of them was.
    """

    workers: int
    running: int
    deaths: int
    loss: str = ""


@dataclass(frozen=True, slots=True)
class WorkerNow:
    """One worker and what it does.

    Attributes:
        worker: Its number in this session.
        state: `starting`, `idle` or `busy`.
        candidate: What it scores; None: nothing.
        documents: On which document set.
        since: Since when, in Unix seconds.
    """

    worker: int
    state: Literal["starting", "idle", "busy"]
    candidate: int | None = None
    documents: str | None = None
    since: float | None = None


class Pool(ABC):
    """Runs jobs on workers; used from one thread, as a context manager."""

    @abstractmethod
    def start(self) -> None:
        """Start the workers.

        Raises:
            UserError: The machine or cluster cannot hold a single worker, or a worker cannot load what the
                run needs.
        """

    @abstractmethod
    def free(self) -> int:
        """Return how many jobs it takes now: those that could start, and what each worker does next."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Take a job; it starts when a worker is free."""

    @abstractmethod
    def withdraw(self) -> int:
        """Forget the jobs that no worker works on; return how many. They get no outcome."""

    @abstractmethod
    def wait(self, timeout: float) -> list[Outcome]:
        """Return the outcomes that have come in, waiting up to `timeout` seconds for the first."""

    @abstractmethod
    def state(self) -> PoolState:
        """Return what the pool has at the moment."""

    @abstractmethod
    def workers_now(self) -> list[WorkerNow]:
        """Return every worker and what it does at the moment."""

    @abstractmethod
    def close(self, *, kill: bool = False) -> None:
        """Stop the workers; `kill`: without letting them finish. May be called twice."""

    def __enter__(self) -> Pool:
        try:
            self.start()
        except BaseException:
            self.close(kill=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(kill=kind is not None)


def lost(job: Job, attempts: int, reason: str) -> Outcome:
    """Return the outcome of a job that no worker could answer."""
    return Outcome(
        candidate=job.candidate,
        documents=job.documents,
        status="failed",
        reason=f"{reason} (tried {attempts} times)" if attempts > 1 else reason,
        cost={"attempts": float(attempts)},
    )
