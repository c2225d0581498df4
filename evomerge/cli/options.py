"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."
    ),
]


def open_store(option: str | None, *, create: bool = False) -> Store:
    """Open the store that the option, the environment or the default names."""
    from evomerge.store import Store

    where = option or DEFAULT_STORE
    if create and "://" not in where:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
    return Store.open(where, create=create)
