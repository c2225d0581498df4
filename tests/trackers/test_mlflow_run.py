"""MLflow's client reads what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="pip install 'evomerge[mlflow]'")

from mlflow import MlflowClient
from mlflow.entities import Run as Logged

from evomerge.store import Run
from evomerge.trackers.targets import Target
from tests.contracts.tracker import TrackerContract, plain, score, track


def logged(folder: Path) -> tuple[MlflowClient, Logged]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("evomerge").experiment_id])
    return client, run


class TestMlflowRun(TrackerContract):
    where = "mlflow:mlflow.db"

    def read(self, folder: Path) -> dict[int, dict[str, float]]:
        client, run = logged(folder)
        found: dict[int, dict[str, float]] = {}
        for name in plain(run.data.metrics):
            for metric in client.get_metric_history(run.info.run_id, name):
                assert name not in found.setdefault(metric.step, {})
                found[metric.step][name] = metric.value
        return dict(sorted(found.items()))

    def test_status_and_config_are_there(self, run: Run, target: Target, tmp_path: Path) -> None:
        score(run, [0, 1])
        track(run, target, status="stopped")
        _, found = logged(tmp_path)
        assert (found.info.run_name, found.info.status) == ("small", "KILLED")
        assert found.data.params == {"name": "small", "optimizer.name": "cma_es"}
