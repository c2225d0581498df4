"""Options that several commands share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.errors import ServerError, StoreError, UserError

if TYPE_CHECKING:
    from evomerge.service.client import Client
    from evomerge.store import Store

DEFAULT_STORE = "runs/evomerge.db"

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="EVOMERGE_STORE",
        help=f"SQLite file or postgresql:// URL [{DEFAULT_STORE}].",
        show_default=False,
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="EVOMERGE_SERVER",
        metavar="URL",
        help="A service to ask in place of a store, such as http://127.0.0.1:8642.",
        show_default=False,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="EVOMERGE_TOKEN_FILE",
        help="The service's token file, where EVOMERGE_TOKEN is not set.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."
    ),
]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def byte_count(text: str, option: str) -> int:
    """Return how many bytes `500MB`, `5GB`, `4GiB` or `1000000` are.

    Raises:
        UserError: It is none of these, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise UserError(f"{option}: expected a size such as 500MB or 5GB, got {text!r}")
    return count


def result_folder(name: str, store: str | None) -> Path:
    """Return where a run's results go by default: beside its SQLite file, else below `runs`."""
    where = store or DEFAULT_STORE
    return (Path("runs") if "://" in where else Path(where).parent) / name


def open_store(option: str | None, *, create: bool = False) -> Store:
    """Open the store that the option, the environment or the default names.

    With `create` one that is not there yet is made by its first run.
    """
    from evomerge.store import Store

    where = option or DEFAULT_STORE
    if not create and "://" not in where and not Path(where).exists():
        raise StoreError(
            f"{where}: no runs here yet; start one with `evomerge run`, or name another store with --store "
            "(the demo's is runs/demo/evomerge.db)"
        )
    return Store.planned(where) if create else Store.open(where, create=False)


def shown_store(where: str) -> str:
    """Return a store's path or URL as it may be shown: without a password."""
    if "://" not in where:
        return where
    from evomerge.store.connect import locate, shown

    return shown(locate(where))


def at_service(context: typer.Context, server: str | None, store: str | None) -> bool:
    """Return whether a command asks a service; an option counts for more than the environment.

    Raises:
        UserError: A store and a service are named alike.
    """
    if server is None or store is None:
        return server is not None
    given = [context.get_parameter_source(name) for name in ("server", "store")]
    if given[0] == given[1]:
        raise UserError(
            "give either --server or --store (or EVOMERGE_SERVER or EVOMERGE_STORE), not both: "
            f"{server} and {shown_store(store)}"
        )
    return getattr(given[0], "name", "") == "COMMANDLINE"


def open_client(server: str | None, token_file: Path | None) -> Client:
    """Return a client of the service that the options or the environment name."""
    from evomerge.service.client import Client, token_from

    if server is None:
        raise ServerError("no service: name it with --server, such as http://127.0.0.1:8642")
    return Client(server, token_from(os.environ.get("EVOMERGE_TOKEN"), token_file))
