"""The command that averages the sources of a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomerge.cli.models import OutArgument, _bytes_written
from evomerge.cli.options import JsonOption, SetOption

if TYPE_CHECKING:
    from evomerge.soup import Comparison, Soup


def soup(
    config: Annotated[
        Path, typer.Argument(help="A run config, for its sources and fitness.", show_default=False)
    ],
    out: OutArgument,
    kind: Annotated[
        Literal["uniform", "greedy"],
        typer.Option("--kind", help="All sources (nothing is scored), or those that raise the score."),
    ] = "greedy",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Average the sources of a config, all or greedily those that help, and write the model."""
    from evomerge.checkpoints.writer import check_target
    from evomerge.cli.display import Listener, print_json
    from evomerge.config import read_config

    parsed = read_config(config, overrides or [])
    check_target(out)
    from evomerge.soup import choose_soup, write_soup

    with Listener() as listener:
        chosen = choose_soup(
            parsed, config.parent.resolve(), kind, listener=listener, notice=listener.notice
        )
    with _bytes_written() as progress:
        write_soup(chosen, out, progress=progress)
    if as_json:
        print_json({"path": str(out), **chosen.to_json()})
    else:
        _show(chosen, out)
