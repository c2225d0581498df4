"""What is promised, the fault that tries it, and the figures; and the book that they are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Promise:
    """A promise.

    Attributes:
        fault: What is done to the run.
        expected: What must come of it.
        figures: What its tests report besides lost evaluations: `kills`, `repeated`, `detect` and `recover`
            (seconds), or counts of its own.
    """

    fault: str
    expected: str
    figures: tuple[str, ...] = ()


PROMISES: dict[str, Promise] = {
    "resume equality": Promise(
        "SIGKILL of the driver at transitions of the run, for every optimizer and space",
        "the history of an undisturbed run, bit for bit",
        ("kills", "repeated", "recover"),
    ),
    "other workers": Promise(
        "as before, resumed with another number of workers",
        "with generations: the same history; without: the record is what the optimizer does with it",
        ("kills", "repeated"),
    ),
    "postgresql": Promise(
        "SIGKILL of the driver, the store on PostgreSQL",
        "the history of an undisturbed run on SQLite, bit for bit",
        ("kills", "repeated"),
    ),
    "crash points": Promise(
        "SIGKILL at every named moment, those of report and export too",
        "what the table of moments says is left; then the same end",
        ("kills", "repeated"),
    ),
    "all or nothing": Promise(
        "SIGKILL while a report or a model is written, at any tensor",
        "no file or a whole one, nothing else left after the next try",
        ("kills",),
    ),
    "driver killed": Promise(
        "SIGKILL of a driver with Ray, at random",
        "the same history; no process or folder of its Ray stays",
        ("kills", "repeated", "recover"),
    ),
    "worker killed": Promise(
        "SIGKILL of workers, at random",
        "each costs one try of one candidate; the same history",
        ("kills", "repeated", "detect", "recover"),
    ),
    "worker crashes": Promise(
        "an evaluation that segfaults, or exits the process",
        "that candidate fails after its tries, the others are scored",
        ("kills",),
    ),
    "worker out of memory": Promise(
        "an evaluation that wants more memory than its process may have",
        "that candidate fails with the reason, the others are scored",
    ),
    "worker hangs": Promise(
        "an evaluation that hangs in C and holds the interpreter; a worker that is frozen",
        "killed at its deadline, tried again on a new worker",
        ("kills", "repeated", "recover"),
    ),
    "bad scores": Promise(
        "an evaluation that returns NaN, infinity, None, text, nothing, ragged or huge results, or raises",
        "an outcome without score, the reason in it; never told as a number, never best",
        ("cases",),
    ),
    "raylet killed": Promise(
        "SIGKILL of the raylet under a worker",
        "its candidate is tried again on another node",
        ("kills", "repeated", "detect", "recover"),
    ),
    "raylet frozen": Promise(
        "SIGSTOP of the raylet under a worker until the candidate was tried again, then SIGCONT",
        "the late result is not taken",
        ("repeated", "detect", "late results offered", "late results taken"),
    ),
    "ray killed": Promise(
        "SIGKILL of the GCS, of the raylet, of all processes of a Ray of our own",
        "it is started again, what was under way is tried again; the same history",
        ("kills", "repeated", "recover"),
    ),
    "head killed": Promise(
        "SIGKILL of the GCS of a cluster that others started",
        "one line and exit code 2, before Ray ends the process; resumed to the same history",
        ("kills", "repeated", "detect"),
    ),
    "node joins": Promise("a node joins while a run waits for room", "it gets workers", ("recover",)),
    "node leaves": Promise(
        "a node leaves in good order under a worker, in the end the last one",
        "its candidate is tried again elsewhere; without any node the run says what it waits for",
        ("repeated", "detect"),
    ),
    "disk full": Promise(
        "no file may grow beyond the n-th page, for each n; a full filesystem",
        "one line and exit code 2, no file is left half-written; resumed to the same history",
        ("stops", "repeated"),
    ),
    "store locked": Promise(
        "another process holds the database",
        "for a moment: the run waits; for long: one line and exit code 2, resumed to the same history",
    ),
    "store damaged": Promise(
        "the file is cut off, a bit of it flips",
        "one line and exit code 2, or the same history; never another history",
        ("bits flipped", "refused", "harmless", "unnoticed"),
    ),
    "snapshot damaged": Promise(
        "the newest snapshots are damaged",
        "an older one, or none, and the log give the same history; the damage is recorded",
    ),
    "connection lost": Promise(
        "PostgreSQL ends the connections, restarts, or stays away",
        "the run goes on when it is back; else one line and exit code 2, resumed to the same history",
        ("connections ended", "recover"),
    ),
    "clock jumps": Promise(
        "the wall clock jumps by a day, forwards and back",
        "the same history; a living driver keeps its run, a dead one does not",
    ),
    "two drivers": Promise(
        "several processes resume one run at once; a frozen driver wakes up after another took its run",
        "one drives, the others are refused; what the woken one brings is refused",
        ("late results offered", "late results taken"),
    ),
    "drift": Promise(
        "a source, a task file or the fitness file changes between stop and resume",
        "refused with both fingerprints; --accept-drift records the change",
    ),
    "signals": Promise(
        "SIGINT once and twice, SIGTERM, SIGHUP with the terminal gone",
        "stopped, exit code 130 (129 and 143 before the search), no traceback; resumed to the same history",
    ),
}


@dataclass
class Entry:
    """What was tried of one promise, and its figures."""

    tried: int = 0
    held: int = 0
    lost: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)


SECONDS = ("detect", "recover")
"""Figures of which the largest is reported; the others are added up."""


class Book:
    """Keeps what the tests report."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def entry(self, promise: str) -> Entry:
        assert promise in PROMISES, promise
        return self.entries.setdefault(promise, Entry())

    @contextmanager
    def trying(self, promise: str) -> Iterator[None]:
        """Count what is done inside as a try of a promise; for tests of more than one."""
        entry = self.entry(promise)
        entry.tried += 1
        yield
        entry.held += 1

    def report(self, promise: str, *, lost: int = 0, **figures: float) -> None:
        """Add figures to a promise; underscores in their names are spaces."""
        entry = self.entry(promise)
        entry.lost += lost
        for name, value in figures.items():
            shown = name.replace("_", " ")
            assert shown in PROMISES[promise].figures, f"{promise}: {shown}"
            if shown in SECONDS:
                entry.most[shown] = max(entry.most.get(shown, 0.0), value)
            else:
                entry.sums[shown] = entry.sums.get(shown, 0) + value

    def add(self, other: Book) -> None:
        """Add what another book says."""
        for name, more in other.entries.items():
            entry = self.entry(name)
            entry.tried += more.tried
            entry.held += more.held
            self.report(name, lost=more.lost, **more.sums, **more.most)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {name: asdict(entry) for name, entry in self.entries.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the book of `to_json`."""
        book = cls()
        book.entries = {name: Entry(**entry) for name, entry in data.items()}
        return book

    def lines(self) -> Iterable[str]:
        """Yield the table."""
        tried = sum(entry.tried for entry in self.entries.values())
        held = sum(entry.held for entry in self.entries.values())
        lost = sum(entry.lost for entry in self.entries.values())
        repeated = int(sum(entry.sums.get("repeated", 0) for entry in self.entries.values()))
        kills = int(sum(entry.sums.get("kills", 0) for entry in self.entries.values()))
        yield f"{'promise':<22}{'held':>9}{'lost':>6}  figures"
        for name in PROMISES:
            if name in self.entries:
                entry = self.entries[name]
                shown = [f"{what} {value:g}" for what, value in entry.sums.items()]
                shown += [f"{what} {value:.2f} s" for what, value in entry.most.items()]
                yield f"{name:<22}{f'{entry.held}/{entry.tried}':>9}{entry.lost:>6}  {', '.join(shown)}"
        yield (
            f"{held} of {tried} tries held, {len(self.entries)} of {len(PROMISES)} promises tried; "
            f"{kills} kills, evaluations lost: {lost}, repeated: {repeated}"
        )
