"""Runs one command while everything it opens, unpickles, executes or connects to is written down.

`python -m tests.security.watched LOG ARGUMENT...`
"""

from __future__ import annotations

import sys
from typing import Any

WATCHED = ("open", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")


def watch(path: str) -> None:
    """Write each event of `WATCHED` into a file, one line each."""
    log = open(path, "a", buffering=1)  # noqa: SIM115

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED:
            log.write(f"{event} {arguments[0]!r} {arguments[1]!r}\n" if len(arguments) > 1 else f"{event}\n")

    sys.addaudithook(note)


if __name__ == "__main__":
    from evomerge.cli import main

    log, *arguments = sys.argv[1:]
    watch(log)
    sys.argv = ["evomerge", *arguments]
    main()
