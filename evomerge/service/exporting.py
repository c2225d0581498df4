"""Exports, one after another, each the command `evomerge export` in a process of its own."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.service.launcher import Driver, LocalLauncher
from evomerge.service.settings import ServiceSettings
from evomerge.store.jobs import Export, JobQueue


def export_target(settings: ServiceSettings, run: str, number: int) -> Path:
    """Return the directory that a candidate is exported to."""
    return settings.folder / "exports" / run / f"model-{number}"


class Exporter:
    """Works off a service's exports; looked at by the supervisor."""

    def __init__(self, settings: ServiceSettings, queue: JobQueue) -> None:
        self._settings, self._queue = settings, queue
        self._launcher = LocalLauncher()

    def look(self) -> None:
        """Note what has ended and start the next."""
        busy = False
        for export in self._queue.exports(states=("running",)):
            if self._launcher.alive(self._driver(export)):
                busy = True
            else:
                self._conclude(export)
        if not busy:
            for export in self._queue.exports(states=("queued",))[:1]:
                self._start(export)

    def _driver(self, export: Export) -> Driver:
        folder = self._settings.folder / "exports" / ".work" / str(export.id)
        return Driver(f"export-{export.id}", folder, {"log": 0})

    def _start(self, export: Export) -> None:
        target = Path(export.path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            options = [] if export.candidate is None else ["--candidate", str(export.candidate)]
            arguments = ["export", export.run, str(target), *options]
            environment = {"EVOMERGE_STORE": self._settings.store}
            self._queue.set_export(export.id, "running")
            self._launcher.start(self._driver(export), arguments, environment)
        except (EvomergeError, OSError) as problem:
            self._queue.set_export(export.id, "failed", str(problem))

    def _conclude(self, export: Export) -> None:
        """Record how an export ended. Its directory appears whole or not at all."""
        if Path(export.path).is_dir():
            self._queue.set_export(export.id, "done")
            return
        complaint = self._launcher.complaint(self._driver(export))
        self._queue.set_export(export.id, "failed", complaint or "its process died; ask for it again")
