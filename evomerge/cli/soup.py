"""The command that averages the sources of a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomerge.cli.models import OutArgument, bytes_written
from evomerge.cli.options import JsonOption, SetOption

if TYPE_CHECKING:
    from evomerge.fitness.scoring import Interval


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
    """Average a config's sources, all or those that help."""
    from evomerge.checkpoints.writer import check_target
    from evomerge.cli.display import Listener, console, print_json, simple_table, warn
    from evomerge.config import read_config

    parsed = read_config(config, overrides or [])
    check_target(out)
    from evomerge.soup import choose_soup, write_soup

    with Listener() as listener:
        chosen = choose_soup(parsed, config.parent.resolve(), kind, listener=listener, notice=listener.notice)
    with bytes_written() as progress:
        write_soup(chosen, out, progress=progress, notice=warn)
    if as_json:
        print_json({"path": str(out), **chosen.to_json()})
        return
    console.print(chosen.verdict, markup=False, soft_wrap=True)
    if chosen.select is not None:
        names = ("soup", chosen.chosen[0]) if chosen.select.gain else ("soup",)
        scores = [
            (name, _shown(score, 1.0, ".4f"))
            for name, score in zip(names, chosen.select.scores, strict=False)
        ]
        console.print(simple_table(("model", "score on select"), scores))
    if chosen.select is not None and chosen.select.gain is not None:
        gain = _shown(chosen.select.gain.interval, 100.0, "+.1f")
        shown = "" if chosen.select.gain.shown else ": not shown to be better"
        line = (
            f"gain on select over {chosen.chosen[0]}, the best single source on search: {gain} points{shown}"
        )
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)


def _shown(interval: Interval, factor: float, form: str) -> str:
    """Return a mean with its 95 % interval, if it has one."""
    mean = format(interval.mean * factor, form)
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} [{interval.low * factor:{form}}, {interval.high * factor:{form}}]"


COMMANDS = (soup,)
