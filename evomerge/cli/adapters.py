"""The command that merges LoRA adapters into an adapter, or extracts one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.models import OutArgument
from evomerge.cli.options import JsonOption


def merge_adapters(
    config: Annotated[Path, typer.Argument(help="A YAML file with a method.", show_default=False)],
    out: OutArgument,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA adapters, or extract one from a model.

    The adapters are of one base; what is written is a PEFT directory.

    Keys of the file: `method` and `dtype`; for `sum` adapters, base, rank; for `lego` adapters, base, rank,
    seed, reweight; for `rmm` adapters, base, components; for `extract` base, model, rank, modules.
    """
    from evomerge.catalogue.adapters import read_settings
    from evomerge.checkpoints.writer import check_target
    from evomerge.cli.display import print_json

    settings = read_settings(config)
    check_target(out)
    from evomerge.merging.adapters import merge_adapters as run

    merged = run(settings, config.parent.resolve(), out)
    errors = {name: error for name, (_, error) in merged.modules.items()}
    ranks = [rank for rank, _ in merged.modules.values()]
    if as_json:
        modules = {
            name: {"rank": rank, "relative_error": error} for name, (rank, error) in merged.modules.items()
        }
        print_json(
            {
                "path": str(merged.path),
                "relative_error": merged.error,
                "modules": modules,
                "left_out": list(merged.left_out),
            }
        )
        return
    worst = max(errors, key=errors.__getitem__)
    typer.echo(f"wrote {merged.path}")
    span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    typer.echo(f"{len(ranks)} modules, rank {span}")
    typer.echo(f"relative error {merged.error:.2e}; largest {errors[worst]:.2e} in {worst}")
    if merged.left_out:
        typer.echo(f"left out: {len(merged.left_out)} other tensors that differ, first {merged.left_out[0]}")


COMMANDS = (merge_adapters,)
