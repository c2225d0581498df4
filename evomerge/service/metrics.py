"""Figures for Prometheus: of the service itself, and of the runs as the store has them when it asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from evomerge.report.overview import LIVE, STATUSES, overview
from evomerge.service.feed import Hub
from evomerge.store import Store
from evomerge.store.jobs import JobQueue

Family = GaugeMetricFamily | CounterMetricFamily


class Metrics:
    """What `/metrics` shows.

    Args:
        store: The store.
        queue: The service's jobs.
        hub: Who watches.
    """

    def __init__(self, store: Store, queue: JobQueue, hub: Hub) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "evomerge_request_seconds",
            "Seconds until an answer begins.",
            ("method", "status"),
            registry=self._registry,
        )
        self._registry.register(_Runs(store, queue, hub))

    def observe(self, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        known = method if method in ("GET", "HEAD", "POST") else "other"
        self._requests.labels(known, str(status)).observe(seconds)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Runs(Collector):
    """Asks the store at each scrape; labels name live runs only, so that their number stays small."""

    def __init__(self, store: Store, queue: JobQueue, hub: Hub) -> None:
        self._store, self._queue, self._hub = store, queue, hub

    def describe(self) -> Iterator[Family]:
        """Say nothing, so that registering does not read the store."""
        yield from ()

    def collect(self) -> Iterator[Family]:
        """Yield the figures as they are now."""
        rows = overview(self._store)["runs"]
        by_status = Counter(row["status"] for row in rows)
        runs = GaugeMetricFamily("evomerge_runs", "Runs by status.", labels=["status"])
        for status in STATUSES:
            runs.add_metric([status], by_status[status])
        yield runs
        yield GaugeMetricFamily("evomerge_watchers", "Who follows events now.", value=self._hub.watchers)
        yield CounterMetricFamily(
            "evomerge_watchers_dropped", "Watchers that did not read.", value=self._hub.dropped
        )
        exports = Counter(export.state for export in self._queue.exports())
        found = GaugeMetricFamily("evomerge_exports", "Exports by state.", labels=["state"])
        for state, number in sorted(exports.items()):
            found.add_metric([state], number)
        yield found
        live = [row["name"] for row in rows if row["status"] in LIVE and row["status"] != "queued"]
        yield from self._live(live)

    def _live(self, names: list[str]) -> Iterator[Family]:
        best = GaugeMetricFamily(
            "evomerge_run_best_search_score", "Best search score, baselines included.", labels=["run"]
        )
        candidates = GaugeMetricFamily(
            "evomerge_run_candidates", "Candidates, baselines included.", labels=["run"]
        )
        outcomes = CounterMetricFamily(
            "evomerge_run_outcomes", "Outcomes so far.", labels=["run", "split", "status"]
        )
        workers = GaugeMetricFamily("evomerge_run_workers", "Workers by state.", labels=["run", "state"])
        busy = GaugeMetricFamily(
            "evomerge_run_busy_share", "Part of the workers' time spent on jobs.", labels=["run"]
        )
        for name in names:
            view = self._store.find(name)
            if view is None:
                continue
            counts = view.counts()
            candidates.add_metric([name], counts.candidates)
            if counts.best_score is not None:
                best.add_metric([name], counts.best_score)
            for split, by_status in counts.outcomes.items():
                for status, number in by_status.items():
                    outcomes.add_metric([name, split, status], number)
            said = view.activity()
            if said is not None:
                states = Counter(worker["state"] for worker in said[1]["workers"])
                for state in ("starting", "idle", "busy"):
                    workers.add_metric([name, state], states[state])
                busy.add_metric([name], said[1]["busy_share"])
        yield from (candidates, best, outcomes, workers, busy)
