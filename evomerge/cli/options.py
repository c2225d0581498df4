"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.errors import StoreError

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


def result_folder(name: str, store: str | None) -> Path:
    """Return where a run's results go by default: beside its SQLite file, else below `runs`."""
    where = store or DEFAULT_STORE
    return (Path("runs") if "://" in where else Path(where).parent) / name


def open_store(option: str | None, *, create: bool = False) -> Store:
    """Open the store that the option, the environment or the default names."""
    from evomerge.store import Store

    where = option or DEFAULT_STORE
    if not create and "://" not in where and not Path(where).exists():
        raise StoreError(
            f"{where}: no runs here yet; start one with `evomerge run`, or name another store with --store "
            "(the demo's is runs/demo/evomerge.db)"
        )
    if create and "://" not in where:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
    return Store.open(where, create=create)
