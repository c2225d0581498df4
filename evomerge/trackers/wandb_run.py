"""A run at Weights & Biases, online or in offline files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from evomerge.checkpoints.whole import write_whole
from evomerge.records import Candidate
from evomerge.trackers.base import Ending, Scored, TrackedRun, Tracker
from evomerge.trackers.targets import Target


class WandbRun(Tracker):
    """Logs to a run whose id is the same in every session.

    wandb's own variables decide the rest: WANDB_MODE (`offline`), WANDB_DIR, WANDB_API_KEY, WANDB_BASE_URL.
    Beside its files `evomerge-ID.json` says how far it is, because offline files do not.

    Args:
        target: A project, or ENTITY/PROJECT.
    """

    def __init__(self, target: Target) -> None:
        self._entity, _, self._project = target.where.rpartition("/")
        self._folder = Path(os.environ.get("WANDB_DIR") or target.folder)
        self._run: Any = None

    def started(self, run: TrackedRun) -> int:
        """Begin the run at W&B, or go on with it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            entity=self._entity or None,
            id=f"evomerge-{run.key}",
            name=run.name,
            config=dict(run.config),
            dir=str(self._folder),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        # Their own step is left alone: it starts anew in offline files.
        self._run.define_metric("outcomes")
        self._run.define_metric("*", step_metric="outcomes")
        self._mark = self._folder / "wandb" / f"evomerge-{run.key}.json"
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads(self._mark.read_text("utf-8"))["outcomes"])
        return int(self._run.summary.get("outcomes") or 0)

    def record(self, candidates: Sequence[Candidate], scored: Sequence[Scored]) -> None:
        """Log one step for each outcome."""
        del candidates
        for entry in scored:
            self._run.log({**entry.metrics, "candidate": entry.candidate.number})
        if scored:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._mark, json.dumps({"outcomes": scored[-1].step}).encode())

    def finished(self, ending: Ending) -> None:
        """Put the result into the run's summary."""
        result = {"status": ending.status, "verdict": ending.verdict, "winner": ending.winner}
        self._run.summary.update({**result, **{f"winner/{name}": s for name, s in ending.scores.items()}})
        self._run.finish(exit_code=int(ending.status == "failed"))
        self._run = None

    def close(self) -> None:
        """End the session."""
        if self._run is not None:
            self._run.finish()
            self._run = None
