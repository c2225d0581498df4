"""Commands that make and score models: merge, export, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from evomerge.cli.options import (
    JsonOption,
    ServerOption,
    SetOption,
    StoreOption,
    TokenFileOption,
    at_service,
    byte_count,
    open_client,
    open_store,
)

OutArgument = Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)]


def merge(
    recipe: Annotated[Path, typer.Argument(help="An evomerge or mergekit YAML file.", show_default=False)],
    out: OutArgument,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Of the weights written [the recipe's, else the base's]."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where tensors are merged: cpu, cuda, cuda:1.")
    ] = "cpu",
    check: Annotated[
        bool, typer.Option("--check", help="Compare the sources first; reads them once more.")
    ] = False,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest weight file, such as 500MB or 5GB.")
    ] = "4GiB",
) -> None:
    """Merge models as a recipe says and write the result."""
    from evomerge.checkpoints.writer import check_target
    from evomerge.cli.display import warn
    from evomerge.errors import CandidateError, RecipeError
    from evomerge.mergekit import read_any_recipe

    parsed = read_any_recipe(recipe)
    if dtype is not None:
        parsed = parsed.model_copy(update={"dtype": dtype})
    largest = byte_count(shard_size, "--shard-size")
    check_target(out)
    from evomerge.merging.inspection import check_sources
    from evomerge.merging.stream import check_device, open_sources, write_model

    check_device(device)
    opened = open_sources(parsed, recipe.parent.resolve(), warn)
    if check and not parsed.stack and parsed.tokenizer is None:
        with bytes_written("checking") as progress:
            for line in check_sources(opened, progress=progress):
                warn(line)
    texts = {"recipe.yaml": parsed.located(recipe.parent.resolve()).to_yaml()}
    with bytes_written() as progress:
        try:
            made = write_model(
                parsed,
                opened,
                out,
                texts=texts,
                progress=progress,
                notice=warn,
                device=device,
                max_shard_bytes=largest,
            )
        except CandidateError as problem:
            raise RecipeError(f"{recipe}: {problem}") from None
    typer.echo(f"wrote {made}")


def export(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Name of the run.", show_default=False)],
    out: OutArgument,
    candidate: Annotated[
        int | None, typer.Option("--candidate", min=0, help="Its number [the winner].")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Write the winner of a run, or any candidate, as a model."""
    from evomerge.checkpoints.writer import check_target

    check_target(out)
    if at_service(context, server, store):
        from evomerge.cli.remote import fetch_export

        with open_client(server, token_file) as client:
            typer.echo(fetch_export(client, run, candidate, out))
        return
    with open_store(store) as opened:
        view = opened.run(run)
        from evomerge.report.export import export_candidate

        with bytes_written() as progress:
            typer.echo(f"wrote {export_candidate(view, out, candidate, progress=progress)}")


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.", show_default=False)],
    config: Annotated[Path, typer.Argument(help="A run config, for its fitness.", show_default=False)],
    split: Annotated[
        Literal["search", "select", "test"], typer.Option("--split", help="Which documents.")
    ] = "select",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score any model on the documents of a config."""
    from evomerge.cli.display import console, errors, print_json, simple_table
    from evomerge.config import read_config

    parsed = read_config(config, overrides or [])
    errors.print("loading", markup=False)
    from evomerge.evaluate import evaluate_model

    outcome = evaluate_model(model, parsed, config.parent.resolve(), split)
    if as_json:
        print_json(outcome.to_json())
        return
    rows = [
        (name, f"{task.metric:.4f}", "-" if task.stderr is None else f"{task.stderr:.4f}")
        for name, task in outcome.tasks.items()
    ]
    score = f"{outcome.score:.4f}" if outcome.score is not None else outcome.reason
    error = "-" if outcome.stderr is None else f"{outcome.stderr:.4f}"
    console.print(simple_table(("task", "metric", "standard error"), [*rows, ("score", score, error)]))


@contextmanager
def bytes_written(what: str = "writing") -> Iterator[Callable[[int, int], None]]:
    """Show how much of a model has been written, on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from evomerge.cli.display import errors

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


COMMANDS = (merge, evaluate, export)
