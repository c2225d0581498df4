"""What commands do at a service in place of a store."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from evomerge.cli.display import Watcher, print_json
from evomerge.errors import ServerError

if TYPE_CHECKING:
    from evomerge.service.client import Client

EXPORT_SECONDS = 0.5
"""Between looks at an export."""


def follow_run(client: Client, name: str) -> None:
    """Show a run's events until it has ended."""
    watcher = Watcher()
    for message in client.events(name):
        if message.kind == "state":
            watcher.state(message.data)
        elif message.id is not None:
            watcher.event(message.kind, message.data["data"])


def oldest_first(client: Client) -> list[dict[str, Any]]:
    """Return the lines of all runs as `evomerge runs` lists them."""
    return list(client.runs())[::-1]


def queue_again(client: Client, name: str, wish: Mapping[str, Any], *, as_json: bool) -> None:
    """Have a service go on with a run, and say where it is."""
    line = client.resume(name, **wish)
    if as_json:
        print_json(line)
    else:
        typer.echo(f"{name}: {line['status']}")


def fetch_export(client: Client, name: str, candidate: int | None, out: Path) -> str:
    """Have a service write a model and take its files away, all or none; return what was done.

    A model with a file that is too large to be sent stays at the service.
    """
    export = client.export(name, candidate)
    while export["state"] in ("queued", "running"):
        time.sleep(EXPORT_SECONDS)
        export = client.export_state(name, export["id"])
    if export["state"] == "failed":
        raise ServerError(f"export of {name}: {export['error']}")
    large = [file["name"] for file in export["files"] if not file["download"]]
    if large:
        return f"wrote {export['path']} on the machine of {client.server}; {large[0]} is too large to be sent"
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for file in export["files"]:
            client.download(name, export["id"], file["name"], partial / Path(file["name"]).name)
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"wrote {out}"
