"""The same contract over long-lived Ray actors.

Actors have `max_restarts=0`: Ray never repeats anything by itself. A dead or hanging actor is replaced by
a new one, and its job is tried again by this pool. A hanging actor is killed, because Ray cannot cancel
a running method. The pool grows to `count` workers as the cluster has room for them, and shares a cluster
with the pools of other runs, see `Share`.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import psutil

from evomerge.errors import UserError
from evomerge.records import Outcome
from evomerge.workers.pool import Job, Pool, PoolState, WorkerNow, lost
from evomerge.workers.ray_head import RayHead
from evomerge.workers.settings import WorkerSettings, WorkerSpec
from evomerge.workers.share import Share

START_SECONDS = 600.0
"""Longest time for a worker to load its sources before it counts as hanging."""

START_ATTEMPTS = 3

RAY_STARTS = 3
"""How often our own Ray is started anew without a single outcome in between."""

NODE_LOSSES = 20
"""How often a candidate may lose its whole node, which is not its fault, before that counts as a try."""

STORE_SECRETS = ("EVOMERGE_STORE", "PGPASSWORD")
"""Environment variables that workers get empty."""

GROW_SECONDS = 0.5
"""Least time between looks at whether the cluster has room for more workers."""


@dataclass(slots=True)
class _Slot:
    """One actor and what it does; `placed`: a node has room for it, so that it can load the worker."""

    actor: Any
    pending: Any
    job: Job | None
    attempts: int
    deadline: float
    number: int
    since: float
    placed: bool = False
    process: psutil.Process | None = None


class RayPool(Pool):
    """Workers as actors of a Ray cluster.

    Args:
        spec: What each worker loads.
        settings: Number and resources of the workers.
    """

    def __init__(self, spec: WorkerSpec, settings: WorkerSettings) -> None:
        self._spec = spec
        self._settings = settings
        self._slots: list[_Slot] = []
        self._jobs: deque[tuple[Job, int]] = deque()
        self._deaths = 0
        self._loss = ""
        self._start_failures = 0
        self._head = RayHead(settings.ray_address)
        self._restarts = 0
        self._ray: Any = None
        self._wanted = 0
        self._needs: dict[str, float] = {}
        self._options: dict[str, Any] = {}
        self._grown = 0.0
        self._started = 0
        self._share: Share | None = None
        self._node_losses: Counter[tuple[int, str]] = Counter()

    def start(self) -> None:
        """Connect to the cluster, or start one here, and start the workers."""
        self._head.connect()
        self._ray = self._head.ray
        total = self._ray.cluster_resources()
        settings = self._settings
        gpus = settings.gpus
        if gpus is None:
            gpus = float(settings.tensor_parallel) if total.get("GPU", 0) > 0 else 0.0
        self._needs = {"CPU": settings.cpus, "GPU": gpus, **settings.resources}
        room = self._room(total)
        if room < 1:
            short = [f"{n:g} {name}" for name, n in self._needs.items() if total.get(name, 0) < n]
            self.close()
            raise UserError(
                f"workers: one worker needs {', '.join(short)}, which the Ray cluster does not have"
            )
        self._wanted = room if settings.count == "auto" else settings.count
        if settings.ray_address is not None:
            self._share = Share(self._ray)
        if self._wanted > room and settings.ray_address is None:
            self.close()
            raise UserError(
                f"workers.count: {self._wanted} workers do not fit on this machine; at most {room} do"
            )
        self._options = {
            "num_cpus": settings.cpus,
            "num_gpus": gpus,
            "resources": settings.resources or None,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": self._environment()},
        }
        self._grow()
        self._await_first()

    def _room(self, resources: dict[str, float]) -> int:
        """Return how many workers fit into resources."""
        return min(int(resources.get(name, 0) / n + 1e-9) for name, n in self._needs.items() if n > 0)

    def _environment(self) -> dict[str, str]:
        threads = str(self._spec.threads)
        passed = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # Workers never open the store, so its password has no business in their environment.
            **{name: "" for name in STORE_SECRETS if name in os.environ},
            **passed,
        }

    def _grow(self) -> None:
        """Start actors up to the wanted number as far as the cluster has room for them now.

        On a cluster that others use too, the first is started in any case: it waits for room, which other
        runs see. So is the whole `count` where it is a number, for which a cluster may add nodes.
        """
        if time.monotonic() - self._grown < GROW_SECONDS:
            return
        self._grown = time.monotonic()
        if self._share is not None and self._settings.count == "auto":
            room = self._room(self._ray.cluster_resources())
            self._wanted = self._share.fair(room)
            self._give_back()
        missing = self._wanted - len(self._slots)
        if missing <= 0:
            return
        if self._share is None or self._settings.count == "auto":
            first = int(self._share is not None and not self._slots)
            missing = min(missing, max(first, self._room(self._ray.available_resources())))
        remote = self._ray.remote(_Actor)
        for _ in range(missing):
            named = {} if self._share is None else self._share.name_of(self._started)
            actor = remote.options(**self._options, **named).remote(self._spec.model_dump(mode="json"))
            slot = _Slot(actor, actor.placed.remote(), None, 0, math.inf, self._started, time.time())
            self._slots.append(slot)
            self._started += 1

    def _give_back(self) -> None:
        """Let go of workers beyond the fair share: those without a job, the newest first."""
        for slot in [slot for slot in reversed(self._slots) if slot.job is None]:
            if len(self._slots) <= self._wanted:
                return
            self._slots.remove(slot)
            self._ray.kill(slot.actor)

    def _await_first(self) -> None:
        """Wait until a worker is up, so that a source or task that cannot be loaded stops the run at once."""
        while not any(slot.pending is None for slot in self._slots):
            self._collect(1.0)

    def free(self) -> int:
        """Return the number of idle workers, and one more for each that is up, beyond the jobs that wait.

        A worker that ends one job finds the next here and does not wait for the driver.
        """
        idle = sum(slot.pending is None for slot in self._slots)
        return max(0, idle + self.state().workers - len(self._jobs))

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append((job, 0))
        self._dispatch()

    def _dispatch(self) -> None:
        for slot in self._slots:
            if slot.pending is None and self._jobs:
                job, attempts = self._jobs.popleft()
                slot.pending = slot.actor.run.remote(job)
                slot.job, slot.attempts = job, attempts + 1
                slot.deadline, slot.since = time.monotonic() + job.deadline, time.time()

    def withdraw(self) -> int:
        """Forget the jobs that no worker works on."""
        count = len(self._jobs)
        self._jobs.clear()
        return count

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has come in."""
        end = time.monotonic() + timeout
        while True:
            outcomes = self._collect(min(max(end - time.monotonic(), 0.0), 1.0))
            if outcomes or time.monotonic() >= end or not (self._jobs or self._running()):
                return outcomes

    def _running(self) -> bool:
        return any(slot.job is not None for slot in self._slots)

    def _collect(self, timeout: float) -> list[Outcome]:
        """Take in what is ready, replace workers that died or hang, and start waiting jobs."""
        self._check_head()
        pending = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        outcomes: list[Outcome] = []
        if pending:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=timeout)
            more, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for reference in {*ready, *more}:
                outcomes += self._take(pending[reference])
        elif timeout:
            time.sleep(min(timeout, 0.05))
        self._restarts = 0 if outcomes else self._restarts
        now = time.monotonic()
        for slot in [s for s in self._slots if s.pending is not None and now > s.deadline]:
            outcomes += self._lose(slot, "the worker gave no answer within its deadline")
        self._grow()
        self._dispatch()
        return outcomes

    def _check_head(self) -> None:
        """Start our own Ray again if it is gone; jobs that were under way are tried again.

        Raises:
            UserError: A cluster is gone, or ours dies again and again.
        """
        why = self._head.gone()
        if not why:
            return
        own, slots = self._head.own, self._slots
        self._deaths += len(slots)
        self._loss = f"Ray is gone: {why}"
        self._slots = []
        self._restarts += 1
        if not own or self._restarts > RAY_STARTS:
            self.close(kill=True)
            what = "start it again, then resume" if not own else "look into the machine's memory, then resume"
            raise UserError(f"workers: Ray is gone ({why}); {what}")
        self._jobs.extendleft((slot.job, slot.attempts) for slot in slots if slot.job is not None)
        self._head.stop()
        self._head.connect()
        for slot in slots:
            _end(slot.process)
        self._grown = 0.0

    def _take(self, slot: _Slot) -> list[Outcome]:
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = self._ray.get(slot.pending)
        except RayTaskError as problem:
            cause = problem.cause
            if isinstance(cause, UserError):
                raise cause from None
            return self._lose(slot, f"the worker raised {type(cause).__name__}: {cause}")
        except RayError as problem:
            return self._lose(slot, f"the worker died: {_first_line(problem)}", node=_lost_node(problem))
        if not slot.placed:
            slot.placed, slot.since = True, time.time()
            slot.pending, slot.deadline = slot.actor.ready.remote(), time.monotonic() + START_SECONDS
            return []
        job, slot.job, slot.pending = slot.job, None, None
        if job is None:
            refusal, pid = answer
            if refusal:
                self.close(kill=True)
                raise UserError(str(refusal))
            slot.process = _process(pid) if self._head.own else None
            self._start_failures = 0
            return []
        outcome: Outcome = answer
        if slot.attempts > 1:
            outcome = Outcome.from_json(
                {**outcome.to_json(), "cost": {**outcome.cost, "attempts": float(slot.attempts)}}
            )
        return [outcome]

    def _lose(self, slot: _Slot, reason: str, *, node: bool = False) -> list[Outcome]:
        """Give up a worker; its job goes back to the queue while it has tries left.

        A node that left, with all its workers, is no fault of the candidate or the worker.
        """
        self._deaths += 1
        self._loss = reason
        self._slots.remove(slot)
        _end(slot.process)
        with contextlib.suppress(Exception):
            self._ray.kill(slot.actor)
        if slot.job is None:
            self._start_failures += not node
            if self._start_failures >= START_ATTEMPTS:
                self.close(kill=True)
                raise UserError(f"workers: no worker could start, tried {START_ATTEMPTS} times: {reason}")
            return []
        if node:
            key = (slot.job.candidate, slot.job.documents)
            self._node_losses[key] += 1
            slot.attempts -= self._node_losses[key] <= NODE_LOSSES
        if slot.attempts > self._settings.retries:
            return [lost(slot.job, slot.attempts, reason)]
        self._jobs.appendleft((slot.job, slot.attempts))
        return []

    def state(self) -> PoolState:
        """Return workers that are up, jobs that run, and deaths so far."""
        up = sum(slot.pending is None or slot.job is not None for slot in self._slots)
        running = sum(slot.job is not None for slot in self._slots)
        return PoolState(workers=up, running=running, deaths=self._deaths, loss=self._loss)

    def workers_now(self) -> list[WorkerNow]:
        """Return the actors, those that start too; a replaced one's number is not used again."""
        found = []
        for slot in self._slots:
            if slot.job is not None:
                job = slot.job
                found.append(WorkerNow(slot.number, "busy", job.candidate, job.documents, slot.since))
            elif slot.pending is not None:
                found.append(WorkerNow(slot.number, "starting", since=slot.since))
            else:
                found.append(WorkerNow(slot.number, "idle"))
        return found

    def close(self, *, kill: bool = False) -> None:
        """Kill the actors and, if it is ours, stop Ray."""
        slots, self._slots = self._slots, []
        self._jobs.clear()
        for slot in slots:
            with contextlib.suppress(Exception):
                self._ray.kill(slot.actor)
        self._head.stop()


class _Actor:
    """Runs in the worker's process; answers with plain records."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._worker: Any = None

    def placed(self) -> None:
        """Answer as soon as a node has room for the actor."""

    def ready(self) -> tuple[str, int]:
        """Load the worker; return what the user must mend, or nothing, and the process id."""
        from evomerge.errors import UserError
        from evomerge.workers.settings import WorkerSpec
        from evomerge.workers.worker import Worker

        try:
            self._worker = Worker(WorkerSpec.model_validate(self._spec))
        except UserError as problem:
            return str(problem), os.getpid()
        return "", os.getpid()

    def run(self, job: Job) -> Outcome:
        """Build and score one candidate."""
        outcome: Outcome = self._worker.run(job)
        return outcome


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _end(process: psutil.Process | None) -> None:
    """Kill a worker on this machine; Ray takes seconds for a frozen one, and for ever without its head."""
    if process is not None:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"


def _lost_node(problem: BaseException) -> bool:
    """Whether a worker died with its node; Ray says so in words only."""
    return "node has died" in str(problem) or type(problem).__name__ == "NodeDiedError"
