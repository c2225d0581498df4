"""What commands do at a service in place of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evomerge.cli.display import Watcher

if TYPE_CHECKING:
    from evomerge.service.client import Client


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
