"""What the routes of one service share."""

from __future__ import annotations

from dataclasses import dataclass

from evomerge.service.feed import Hub
from evomerge.service.metrics import Metrics
from evomerge.service.settings import ServiceSettings
from evomerge.service.shown import ShownRuns
from evomerge.service.supervisor import Supervisor
from evomerge.store import Store
from evomerge.store.jobs import JobQueue


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running service."""

    settings: ServiceSettings
    store: Store
    queue: JobQueue
    supervisor: Supervisor
    hub: Hub
    metrics: Metrics
    shown: ShownRuns
