"""Moments at which a command can be told to die, for the tests of what a kill costs.

`EVOMERGE_CRASH_AT=NAME:N` kills the process by SIGKILL, which nothing can tidy up after, when it comes to the
named moment for the N-th time; `any:N` at the N-th moment of any name. Without it `reached` does nothing.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from evomerge.errors import UserError, nearest

VARIABLE = "EVOMERGE_CRASH_AT"

ANY = "any"


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A moment at which a kill may come.

    Attributes:
        where: What has been done, and what not yet.
        repeats: Evaluations that are done again after a kill here, at most, for each worker.
        left: What of the interrupted step is found afterwards.
    """

    where: str
    repeats: int
    left: str


CRASH_POINTS = {
    "tables_made": CrashPoint("a new store's tables are made, not committed", 0, "no store, or an empty one"),
    "run_written": CrashPoint("a new run is written, not committed", 0, "no run"),
    "run_created": CrashPoint("a new run is recorded, nothing else is", 0, "the run"),
    "run_taken": CrashPoint("a resumed run is taken, its config is the old one", 0, "the run"),
    "replayed": CrashPoint("a resumed optimizer is where it was, nothing new was done", 0, "the run"),
    "documents_recorded": CrashPoint("a document set is recorded", 0, "the document set"),
    "phase_recorded": CrashPoint("a phase begins", 0, "the phase"),
    "asked": CrashPoint("the optimizer made a proposal, nobody knows it", 0, "nothing; it is proposed again"),
    "candidate_written": CrashPoint("a candidate is written, not committed", 0, "nothing"),
    "candidate_recorded": CrashPoint("a candidate is recorded, not submitted", 0, "the candidate, owed"),
    "submitted": CrashPoint("a candidate is with the workers", 1, "the candidate, owed"),
    "outcome_received": CrashPoint("an outcome came in, nobody wrote it", 1, "the candidate, owed"),
    "outcome_written": CrashPoint("an outcome is written, not committed", 1, "the candidate, owed"),
    "outcome_recorded": CrashPoint(
        "an outcome is recorded, the optimizer does not know it", 0, "the outcome"
    ),
    "optimizer_told": CrashPoint("the optimizer knows it, the store does not say so", 0, "the outcome"),
    "tell_written": CrashPoint("a tell is written without its snapshot, not committed", 0, "the outcome"),
    "snapshot_written": CrashPoint("a tell and its snapshot are written, not committed", 0, "the outcome"),
    "tell_recorded": CrashPoint("a tell and its snapshot are recorded", 0, "both"),
    "test_opened": CrashPoint("the look at the test documents is recorded, not yet taken", 0, "the look"),
    "search_ended": CrashPoint("everything is scored, the run still has its driver", 0, "all outcomes"),
    "run_released": CrashPoint("the run is finished, no report or model is written", 0, "a finished run"),
    "file_written": CrashPoint("a report or population is written beside its place", 0, "the one of before"),
    "tensor_written": CrashPoint("a tensor of an export is written", 0, "no model"),
    "export_written": CrashPoint("an export is complete under another name", 0, "no model"),
    "exported": CrashPoint("an export has its name", 0, "the model"),
}
"""Every moment by name. The tests kill at each of them."""

passed: list[str] = []
"""The moments that came, in order, noted while a kill is asked for."""

_name = ""
_count = 0


def arm(wanted: str | None) -> None:
    """Ask for a kill, or for none.

    Args:
        wanted: `NAME:N`, `any:N`, `NAME` for its first time; None or empty: none. N = 0 only counts.

    Raises:
        UserError: There is no such moment.
    """
    global _name, _count
    name, _, number = (wanted or "").partition(":")
    if name and name != ANY and name not in CRASH_POINTS:
        raise UserError(f'{VARIABLE}: there is no moment "{name}"{nearest(name, CRASH_POINTS)}')
    if number and not number.isdecimal():
        raise UserError(f'{VARIABLE}: expected NAME:N with a number N, got "{wanted}"')
    _name, _count = name, int(number or 1)
    passed.clear()


def reached(name: str) -> None:
    """Say that a moment has come; die if that was asked for."""
    if not _name:
        return
    passed.append(name)
    came = len(passed) if _name == ANY else passed.count(_name)
    if came == _count and _name in (name, ANY):
        os.kill(os.getpid(), signal.SIGKILL)
