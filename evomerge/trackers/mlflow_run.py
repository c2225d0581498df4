"""A run at an MLflow server, or in a SQLite file of MLflow's."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from evomerge.records import Candidate
from evomerge.trackers.base import Ending, Scored, TrackedRun, Tracker
from evomerge.trackers.targets import Target

_TAG = "evomerge.run"
_MOST_METRICS, _MOST_PARAMS, _MOST_LETTERS = 1000, 100, 500
"""What MLflow takes at once, and of one parameter."""

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun(Tracker):
    """Logs to a run of the experiment MLFLOW_EXPERIMENT_NAME, `evomerge` by default.

    Args:
        target: A SQLite file, or a tracking URI such as `http://HOST:5000`.
    """

    def __init__(self, target: Target) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = target.where if target.is_url else f"sqlite:///{target.path}"
        self._client = MlflowClient(tracking_uri=uri)
        self._run = ""

    def started(self, run: TrackedRun) -> int:
        """Find the run by its tag, or make it."""
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "evomerge")
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = client.search_runs([number], f"tags.`{_TAG}` = '{run.key}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return int(found[0].data.metrics.get("outcomes", 0))
        self._run = client.create_run(number, run_name=run.name, tags={_TAG: run.key}).info.run_id
        params = [Param(key, value[:_MOST_LETTERS]) for key, value in _flat(run.config).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])
        return 0

    def record(self, candidates: Sequence[Candidate], scored: Sequence[Scored]) -> None:
        """Log one step for each outcome; its number `outcomes` is written last."""
        del candidates
        metrics = [
            Metric(
                _name(name), value, int(1000 * (time.time() if entry.at is None else entry.at)), entry.step
            )
            for entry in scored
            for name, value in reversed(entry.metrics.items())
        ]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + _MOST_METRICS])

    def finished(self, ending: Ending) -> None:
        """Set the status, and tags with the result."""
        for name, value in (("verdict", ending.verdict), ("winner", ending.winner), ("error", ending.error)):
            if value not in ("", None):
                self._client.set_tag(self._run, f"evomerge.{name}", str(value))
        now = int(1000 * time.time())
        for name, score in ending.scores.items():
            self._client.log_metric(self._run, f"winner/{name}", score, now, 0)
        self._client.set_terminated(self._run, _STATUS[ending.status])

    def close(self) -> None:
        """Nothing is held."""


def _flat(data: Any, path: str = "") -> dict[str, str]:
    """Return the leaves of a config by dotted path."""
    if isinstance(data, Mapping):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{path}{key}.").items()}
    return {} if data is None or data in ([], {}) else {path.rstrip(".")[:250]: str(data)}


def _name(name: str) -> str:
    """Return a metric's name in the letters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
