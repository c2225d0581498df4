"""The command that looks at sources before they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.models import bytes_written
from evomerge.cli.options import JsonOption


def inspect(
    models: Annotated[
        list[str], typer.Argument(help="Model directories or hub ids, adapters too.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="What they were fine-tuned from [the first of them].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how far models moved and whether they fit together."""
    from evomerge.checkpoints.compatible import check_compatible
    from evomerge.checkpoints.opening import open_checkpoint
    from evomerge.cli.display import console, print_json, simple_table, warn
    from evomerge.errors import SourceError

    wanted = ([base] if base else []) + models
    if len(set(wanted)) < max(2, len(wanted)):
        raise SourceError("models: give two different models or more, or one and its --base")
    opened = {where: open_checkpoint(where, base_dir=Path()) for where in wanted}
    for line in check_compatible(opened, aligning=True):
        warn(line)
    from evomerge.merging.inspection import inspect_sources

    with bytes_written("comparing") as progress:
        found = inspect_sources(opened, progress=progress)
    for line in found.warnings():
        warn(line)
    if as_json:
        print_json(found.to_json())
        return
    for source in found.sources:
        verdict, reason = source.judge()
        rows = [
            (
                part,
                f"{drift.relative:.3g}",
                f"{drift.changed / max(1, drift.entries):.0%}",
                drift.largest_name,
            )
            for part, drift in source.parts.items()
        ]
        rows += [
            (f"{pair} products", f"{product.relative:.3g}", "", product.largest_place)
            for pair, product in source.products.items()
        ]
        console.print(
            f"{source.name} against {found.base}: {verdict} ({reason})", markup=False, soft_wrap=True
        )
        console.print(simple_table(("part", "drift", "changed", "most"), rows))
    if len(found.sources) > 1:
        names = [source.name for source in found.sources]
        cells = [
            (name, *("-" if cosine is None else f"{cosine:.3f}" for cosine in row))
            for name, row in zip(names, found.cosines["all"], strict=True)
        ]
        console.print(simple_table(("cosine of deltas", *names), cells))
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)


COMMANDS = (inspect,)
