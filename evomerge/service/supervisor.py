"""Gives every job its driver, one process a run, and takes note of how it ends.

All it knows is in the store; what it does at one look follows from what it finds there and from which
drivers live. So a service that was killed goes on at its next start, with drivers that went on without it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import EvomergeError, UserError
from evomerge.service.exporting import Exporter
from evomerge.service.launcher import Driver, Launcher
from evomerge.service.settings import ServiceSettings
from evomerge.store import RunView, Store
from evomerge.store.jobs import Job, JobQueue
from evomerge.strict import dump_yaml

LOOK_SECONDS = 0.5
KILL_SECONDS = 20.0
"""How long a driver that is to end now may take before it is killed."""

_log = logging.getLogger(__name__)


def job_folder(settings: ServiceSettings, name: str) -> Path:
    """Return the folder of a job; its name is one of a run, never a path."""
    return settings.folder / "jobs" / name


class Supervisor:
    """Looks after the jobs of one service, in a thread of its own.

    Args:
        settings: The operator's.
        store: The store, opened.
        queue: This service's jobs in it.
        launcher: What starts drivers.
    """

    def __init__(self, settings: ServiceSettings, store: Store, queue: JobQueue, launcher: Launcher) -> None:
        self._settings, self._store, self._queue, self._launcher = settings, store, queue, launcher
        self._exporter = Exporter(settings, queue)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._told_to_end: dict[int, float] = {}
        self._not_before: dict[int, float] = {}
        self._problems: dict[int, str] = {}

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look now: something was submitted, cancelled or resumed."""
        self._wake.set()

    def close(self) -> None:
        """Stop looking. Drivers and an export that is running go on."""
        self._ended.set()
        self._wake.set()
        self._thread.join()

    def log(self, name: str, most: int) -> str:
        """Return the end of what the latest driver of a job has written, at most so many bytes."""
        job = self._queue.job(name)
        return "" if job is None else self._launcher.log(self._driver(job), most)

    def _loop(self) -> None:
        while not self._ended.is_set():
            self._wake.clear()
            try:
                self.look()
            except EvomergeError as problem:
                _log.error("supervisor: %s", problem)
            except Exception:
                _log.exception("supervisor: one look failed")
            self._wake.wait(LOOK_SECONDS)

    def look(self) -> None:
        """Look once: end what has ended, start what may start."""
        running = sum(self._looked_after(job) for job in self._queue.jobs("running"))
        for job in self._queue.jobs("queued"):
            if running >= self._settings.at_once:
                break
            if time.monotonic() >= self._not_before.get(job.id, 0.0):
                running += self._start(job)
        self._exporter.look()

    def _driver(self, job: Job) -> Driver:
        name = f"evomerge-{self._settings.identity}-{job.id}-{job.attempts}"
        return Driver(name, job_folder(self._settings, job.name), job.handle)

    def _start(self, job: Job) -> bool:
        view = self._store.find(job.name)
        epoch, outcomes = (view.epoch, _outcomes(view)) if view else (0, 0)
        begun = self._queue.begin(job, epoch=epoch, outcomes=outcomes)
        if begun is None:
            return False
        try:
            arguments = self._arguments(begun, resumes=view is not None)
            environment = {"EVOMERGE_STORE": self._settings.store}
            self._queue.set_handle(begun, self._launcher.start(self._driver(begun), arguments, environment))
        except (EvomergeError, OSError) as problem:
            # Perhaps it started all the same: the next look finds out.
            self._problems[job.id] = str(problem)
            _log.warning('run "%s": %s', job.name, problem)
        return True

    def _arguments(self, job: Job, *, resumes: bool) -> list[str]:
        """Return the command that drives a job; write the config that it reads."""
        folder = job_folder(self._settings, job.name)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        given = [f"output.folder={_quoted(folder / 'result')}"]
        if self._settings.ray_address is not None:
            given.append('workers.ray_address="auto"')
        options = [*job.options, *(part for line in given for part in ("--set", line))]
        if resumes:
            return ["resume", job.name, *options]
        config = folder / "config.yaml"
        config.write_text(dump_yaml(dict(job.config)), encoding="utf-8")
        return ["run", str(config), "--relative-to", job.folder, *options]

    def _looked_after(self, job: Job) -> bool:
        """See to a job that has a driver; return whether it still has one, as far as is known."""
        driver = self._driver(job)
        try:
            alive = self._launcher.alive(driver)
        except UserError as problem:
            _log.warning('run "%s": %s', job.name, problem)
            return True
        if alive:
            if job.cancel:
                self._end_driver(job, driver)
            return True
        return not self._concluded(job, driver)

    def _end_driver(self, job: Job, driver: Driver) -> None:
        """Let the driver end itself where it can hear; end the process where it cannot."""
        view = self._store.find(job.name)
        first = job.id not in self._told_to_end
        since = self._told_to_end.setdefault(job.id, time.monotonic())
        if view is not None and view.owner_alive and view.epoch > job.epoch:
            if view.requested() not in (job.cancel, "now"):
                view.request(job.cancel)
        elif first:
            self._launcher.stop(driver)
        if job.cancel == "now" and time.monotonic() - since > KILL_SECONDS:
            self._launcher.stop(driver, kill=True)

    def _concluded(self, job: Job, driver: Driver) -> bool:
        """Record how a job ended whose driver is gone, or start it again; return whether either was done."""
        view = self._store.find(job.name)
        if view is None or view.epoch == job.epoch:  # the driver never had the run
            complaint = self._launcher.complaint(driver)
            if job.cancel:
                self._queue.end(job, "cancelled")
            elif complaint:
                self._queue.end(job, "failed", complaint)
            else:
                self._again(job, 0)
        elif view.status != "running":
            self._queue.end(job, view.status, view.error)
        elif view.owner_alive and view.epoch == job.epoch + 1:
            return False  # it was on another machine, where it counts as alive until its lease ends
        elif view.owner_alive:
            self._queue.end(job, "", f"driven by {view.owner}, which this service did not start")
        elif job.cancel:
            self._queue.end(job, "cancelled")
        else:
            self._again(job, _outcomes(view) - job.outcomes)
        self._told_to_end.pop(job.id, None)
        return True

    def _again(self, job: Job, progress: int) -> None:
        restarts = 0 if progress > 0 else job.restarts + 1
        problem = self._problems.pop(job.id, "")
        if restarts > self._settings.restarts:
            often = f"drivers that died in a row without a new outcome: {restarts}; see its log"
            self._queue.end(job, "failed" if problem else "interrupted", problem or often)
            return
        _log.warning('run "%s": its driver died; starting it again', job.name)
        self._not_before[job.id] = time.monotonic() + 2.0 ** min(restarts, 6) - 1.0
        self._queue.again(job, restarts=restarts)


def _outcomes(view: RunView) -> int:
    tallies: Mapping[str, Mapping[str, int]] = view.counts().outcomes
    return sum(sum(by_status.values()) for by_status in tallies.values())


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
