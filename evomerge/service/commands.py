"""Commands that a service runs in processes of their own: it loads neither torch nor anybody's code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import LimitError, UserError
from evomerge.service.launcher import clean_environment, complaints

AT_ONCE = 2
WAIT_SECONDS = 30.0
LONGEST_SECONDS = 180.0

_places = threading.BoundedSemaphore(AT_ONCE)


def run_command(arguments: Sequence[str | Path], store: str, error: type[UserError]) -> str:
    """Run `evomerge` and return what it printed.

    Args:
        arguments: Of the command.
        store: The store that it reads.
        error: Raised with the command's own line where it refuses.

    Raises:
        LimitError: As many run already and none ended in `WAIT_SECONDS`.
        UserError: It took longer than `LONGEST_SECONDS`, or died.
    """
    if not _places.acquire(timeout=WAIT_SECONDS):
        raise LimitError(f"{AT_ONCE} commands run already; ask again in a moment")
    try:
        return _run([str(argument) for argument in arguments], store, error)
    finally:
        _places.release()


def run_json(arguments: Sequence[str | Path], store: str, error: type[UserError]) -> Any:
    """Run `evomerge` with `--json` and return its answer; see `run_command`."""
    return json.loads(run_command([*arguments, "--json"], store, error))


def _run(arguments: list[str], store: str, error: type[UserError]) -> str:
    with subprocess.Popen(
        [sys.executable, "-m", "evomerge", *arguments],
        env={**clean_environment(), "EVOMERGE_STORE": store},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=LONGEST_SECONDS)
        except BaseException as problem:
            os.killpg(child.pid, signal.SIGKILL)
            if isinstance(problem, subprocess.TimeoutExpired):
                raise error(
                    f"`evomerge {arguments[0]}` took longer than {LONGEST_SECONDS:.0f} s and was ended"
                ) from None
            raise
    if child.returncode == 0:
        return out
    lines = err.strip().splitlines() or ["it said nothing"]
    if child.returncode == 2:
        first, *others = complaints(lines) or lines[-1:]
        raise error(first, others)
    last = lines[-1]
    raise error(f"`evomerge {arguments[0]}` ended with {child.returncode}: {last[:300]}")
