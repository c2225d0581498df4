"""What commands print: tables, progress, JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from evomerge.errors import printable
from evomerge.progress import Progress as Step

PLAIN_SECONDS = 5.0
"""Least time between progress lines where there is no terminal."""

MOST_TASKS = 8
"""Most columns of tasks in a table on a terminal."""


class SafeConsole(Console):
    """Prints texts that others wrote (names, paths, reasons) so that they cannot steer the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text without control characters but for line breaks."""
        return super().render_str(printable(text, keep="\n"), **options)


console = SafeConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = SafeConsole(stderr=True, highlight=False)


def warn(line: str) -> None:
    """Print a line that the reader should know, beside the output."""
    errors.print(f"note: {line}", markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data as JSON, the only thing on standard output."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


@contextmanager
def _seen_or_not() -> Iterator[None]:
    """Go on where a terminal or pipe is gone: a search must not end because nobody watches it."""
    with suppress(OSError):
        yield


class Listener:
    """Shows a run's progress on standard error: a bar on a terminal, lines elsewhere.

    Used as a context manager; `notice` prints a line at any time.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._phase = ""
        self._began = (0, time.monotonic())
        self._shown = 0.0

    def __enter__(self) -> Listener:
        if errors.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=16),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=errors,
            )
            self._bar.start()
        return self

    def __exit__(self, *rest: object) -> None:
        if self._bar is not None:
            with _seen_or_not():
                self._bar.stop()

    def notice(self, text: str) -> None:
        """Print a line for people."""
        with _seen_or_not():
            errors.print(text, markup=False, soft_wrap=True)

    def __call__(self, step: Step) -> None:
        """Show one step."""
        with _seen_or_not():
            self._show(step)

    def _show(self, step: Step) -> None:
        now = time.monotonic()
        if step.phase != self._phase:
            self._phase, self._began = step.phase, (step.done - 1, now)
            if self._bar is not None:
                self._task = self._bar.add_task(step.phase, total=step.total, line="")
        done, seconds = step.done - self._began[0], now - self._began[1]
        rate = (done - 1) / seconds * 60 if done > 1 and seconds > 0 else 0.0
        left = (step.total - step.done) / rate * 60 if rate else None
        line = self._line(step, rate, left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step.done, total=step.total, line=line)
        elif now - self._shown > PLAIN_SECONDS or step.done == step.total:
            self._shown = now
            errors.print(f"{step.phase:<10} {step.done}/{step.total}  {line}", markup=False, soft_wrap=True)

    @staticmethod
    def _line(step: Step, rate: float, left: float | None) -> str:
        parts = []
        if step.best is not None:
            parts.append(f"best {'' if step.phase == 'search' else 'of the search '}{step.best:.3f}")
        parts.append("last failed" if step.current is None else f"last {step.current:.3f}")
        if rate:
            parts.append(f"{rate:.0f}/min")
        if left is not None and step.done < step.total:
            parts.append(f"{duration(left)} left")
        parts.append(f"{step.workers} worker{'s' if step.workers != 1 else ''}")
        if step.failures:
            parts.append(f"{step.failures} failed")
        if step.deaths:
            parts.append(f"{step.deaths} workers lost")
        return "  ".join(parts)


class Watcher:
    """Shows what happens in a run that another process drives, one line each on standard error."""

    def __init__(self) -> None:
        self._shown: tuple[object, ...] = ()

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Show one event of the run's log; outcomes are in the state."""
        if kind != "outcome":
            details = ", ".join(
                f"{value}" if key == kind else f"{key} {value}" for key, value in data.items()
            )
            errors.print(f"{kind}: {details}", markup=False, soft_wrap=True)

    def state(self, line: Mapping[str, Any]) -> None:
        """Show the run's line where it has changed."""
        now = (line["candidates"], line["evaluations"], line["best_search_score"], line["status"])
        if now == self._shown:
            return
        self._shown = now
        best = "-" if line["best_search_score"] is None else f"{line['best_search_score']:.3f}"
        besides = line["candidates"] - line["evaluations"]
        counts = f": {spent(line)} evaluations, {besides} candidates besides (baselines and the like)"
        counts += f", best search score {best} (baselines included)"
        begun = line["candidates"] > 0
        errors.print(f"{line['status']}{counts if begun else ''}", markup=False, soft_wrap=True)
        if line["error"]:
            errors.print(f"error: {line['error']}", markup=False, soft_wrap=True)


def spent(line: Mapping[str, Any]) -> str:
    """Return how much of its budget a run's line says was spent, as `12/24`."""
    return f"{line['evaluations']}/{'?' if line['budget'] is None else line['budget']}"


@contextmanager
def training() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows how far each stage of a training is: a bar on a terminal, lines elsewhere."""
    stages: dict[str, TaskID] = {}
    columns = (
        TextColumn("training {task.description:<8}"),
        BarColumn(28),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=errors, disable=not errors.is_terminal) as bar:

        def show(name: str, done: int, total: int) -> None:
            if name not in stages:
                stages[name] = bar.add_task(name, total=total)
            bar.update(stages[name], completed=done)
            if not errors.is_terminal and (done == total or done % 50 == 0):
                errors.print(f"training  {name} {done}/{total}", markup=False, soft_wrap=True)

        yield show


def duration(seconds: float) -> str:
    """Return a length of time for people, such as `3m 20s`."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m {seconds % 60:02.0f}s"
    return f"{seconds // 3600:.0f}h {seconds % 3600 // 60:02.0f}m"


def moment(seconds: float) -> str:
    """Return a Unix time for people, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def with_interval(scores: Mapping[str, Any] | None) -> str:
    """Return `0.512 [0.480, 0.544]`, a dash where there is nothing."""
    if scores is None:
        return "-"
    text = f"{scores['score']:.3f}"
    if scores.get("low") is not None:
        text += f" [{scores['low']:.3f}, {scores['high']:.3f}]"
    return text


def print_found(data: Mapping[str, Any]) -> None:
    """Print the tables and the verdict of what `evomerge.report.overview.shown` returns."""
    if data["best"]:
        console.print(result_table(data))
    if data["gains"]:
        console.print(task_table(data))
    if data["best"]:
        console.print(data["verdict"], markup=False)


def result_table(data: Mapping[str, Any]) -> Table:
    """Return the scores of winner and baselines, from what `Summary.to_json` returns."""
    table = Table(title=f"{data['name']}: scores (95 % bootstrap intervals)", title_justify="left")
    table.add_column("model", no_wrap=True)
    for split in ("search", "select", "test"):
        table.add_column(split, justify="right", no_wrap=True)
    rows = [data["best"]] if data["best"] else []
    for row in [*rows, *data["baselines"]]:
        search = row["search"]
        name = row["name"]
        if row is data["best"]:
            name = f"{'winner' if row['chosen_on'] == 'select' else 'best so far'} (#{row['candidate']})"
        if row["origin"].startswith("baseline:task_arithmetic@"):
            name += f" @{row['origin'].partition('@')[2]}"
        table.add_row(
            name,
            "-" if search is None else f"{search:.3f}",
            with_interval(row["select"]),
            with_interval(row["test"]),
            style="bold" if row is data["best"] else None,
        )
    return table


def task_table(data: Mapping[str, Any]) -> Table | str:
    """Return the test metrics of winner and baselines, one column a task, as far as they fit."""
    rows = [row for row in ([data["best"]] if data["best"] else []) + data["baselines"] if row["test"]]
    names = list(rows[0]["test"]["tasks"]) if rows else []
    if len(names) > MOST_TASKS:
        return f"{len(names)} tasks: the report has their metrics"
    table = Table(title="test metrics by task", title_justify="left")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["name"], *(f"{row['test']['tasks'][name]['metric']:.3f}" for name in names))
    return table


def simple_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a plain table."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table
