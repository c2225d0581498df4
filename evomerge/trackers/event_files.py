"""A run as event files for TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from evomerge.errors import UserError
from evomerge.records import Candidate
from evomerge.strict import dump_yaml
from evomerge.trackers.base import Ending, Scored, TrackedRun, Tracker
from evomerge.trackers.targets import Target

RUN_FILE = "evomerge.json"
"""Says which run a folder belongs to."""


class EventFiles(Tracker):
    """Writes scalars into a folder with the run's name, a new file for every session; TensorBoard joins them.

    Args:
        target: A folder; `tensorboard --logdir` takes it.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._writer: EventFileWriter | None = None

    def started(self, run: TrackedRun) -> int:
        """Read how far the folder's files go, and begin another one if there is anything to write."""
        self._folder = self._target.path / run.name
        self._folder.mkdir(parents=True, exist_ok=True)
        mark = self._folder / RUN_FILE
        if mark.is_file() and json.loads(mark.read_text("utf-8")) != {"run": run.key}:
            raise UserError(f'{self._target} has another run "{run.name}"; give another folder')
        mark.write_text(json.dumps({"run": run.key}), "utf-8")
        steps = _last_step(self._folder)
        if not steps:
            self._text("config", f"```yaml\n{dump_yaml(dict(run.config))}```", 0)
        return steps

    def record(self, candidates: Sequence[Candidate], scored: Sequence[Scored]) -> None:
        """Write one event for each outcome, with all its numbers."""
        del candidates
        for entry in scored:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.metrics.items()]
            at = time.time() if entry.at is None else entry.at
            self._add(Event(wall_time=at, step=entry.step, summary=Summary(value=values)))
        if scored and self._writer is not None:
            self._writer.flush()
            self._step = scored[-1].step

    def finished(self, ending: Ending) -> None:
        """Write what was found, if anything was written in this session."""
        if self._writer is not None:
            self._text("result", f"{ending.status}. {ending.verdict}", getattr(self, "_step", 0))
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=tag, tensor=make_tensor_proto([text]), metadata=kind)
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def _add(self, event: Event) -> None:
        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
        self._writer.add_event(event)


def _last_step(folder: Path) -> int:
    """Return the last outcome in a folder's files; a torn end of a file counts for nothing."""
    steps = 0
    for file in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            steps = max(steps, event.step)
    return steps
