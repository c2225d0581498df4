"""Commands that read runs: runs, show, watch, recipe, report, methods."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from evomerge.cli.options import JsonOption, StoreOption, open_store, result_folder

RunArgument = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]


def runs(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the runs of a store."""
    from evomerge.cli.display import console, moment, print_json, simple_table
    from evomerge.report.summary import status_of

    rows: list[dict[str, Any]] = []
    with open_store(store) as opened:
        for view in opened.runs():
            counts = view.counts()
            rows.append(
                {
                    "name": view.name,
                    "status": status_of(view),
                    "candidates": counts.candidates,
                    "best_search_score": counts.best_score,
                    "created": view.created,
                    "updated": view.updated,
                }
            )
    if as_json:
        print_json(rows)
        return
    table = [
        (
            row["name"],
            row["status"],
            row["candidates"],
            "-" if row["best_search_score"] is None else f"{row['best_search_score']:.3f}",
            moment(row["updated"]),
        )
        for row in rows
    ]
    console.print(
        simple_table(
            ("run", "status", "candidates", "best search score (baselines included)", "updated"), table
        )
    )


def show(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what a run found."""
    from evomerge.cli.display import console, print_json, result_table, task_table
    from evomerge.report.summary import Summary

    with open_store(store) as opened:
        summary = Summary(opened.run(run))
        data = summary.to_json()
    if as_json:
        print_json(data)
        return
    console.print(
        f"{data['name']}: {data['status']}, {data['evaluations']} evaluations, {data['failures']} failed"
    )
    if data["error"]:
        console.print(f"error: {data['error']}", markup=False, soft_wrap=True)
    if data["best"]:
        console.print(result_table(data))
    if data["gains"]:
        console.print(task_table(data))
    if data["best"]:
        console.print(data["verdict"], markup=False)
    for failure in summary.failures()[:5]:
        console.print(
            f"candidate {failure['candidate']} {failure['status']}: {failure['reason']}",
            markup=False,
            soft_wrap=True,
        )


def watch(
    run: RunArgument,
    store: StoreOption = None,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between looks.")] = 2.0,
) -> None:
    """Follow a run that another process drives, until it ends."""
    from evomerge.cli.display import errors
    from evomerge.report.summary import status_of

    seen = 0
    shown: tuple[object, ...] = ()
    with open_store(store) as opened:
        while True:
            view = opened.run(run)
            for event in view.events(after=seen):
                seen = event.id
                details = ", ".join(f"{key} {value}" for key, value in event.data.items())
                errors.print(f"{event.kind}: {details}", markup=False, soft_wrap=True)
            counts = view.counts()
            status = status_of(view)
            now = (counts.candidates, counts.best_score, status)
            if now != shown:
                shown = now
                best = "-" if counts.best_score is None else f"{counts.best_score:.3f}"
                errors.print(
                    f"{status}: {counts.candidates} candidates, best search score {best}, baselines included"
                )
            if status != "running":
                return
            time.sleep(interval)


def recipe(
    run: RunArgument,
    candidate: Annotated[
        int | None, typer.Option("--candidate", min=0, help="Its number [the winner].")
    ] = None,
    format: Annotated[
        Literal["evomerge", "mergekit"], typer.Option("--format", help="Of the file.")
    ] = "evomerge",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the recipe of the winner or of any candidate."""
    from evomerge.cli.display import print_json
    from evomerge.errors import StoreError
    from evomerge.recipe import parse_recipe
    from evomerge.report.summary import Summary
    from evomerge.strict import dump_yaml

    with open_store(store) as opened:
        view = opened.run(run)
        number = Summary(view).best if candidate is None else candidate
        if number is None:
            raise StoreError(f'run "{run}": no candidate has been scored yet')
        stored = parse_recipe(dict(view.candidate(number).recipe), f"candidate {number}")
        found = stored.located(Path(view.facts["base_dir"]))
    if format == "mergekit":
        from evomerge.checkpoints.layout import layout_of
        from evomerge.checkpoints.opening import open_checkpoint
        from evomerge.mergekit_writer import to_mergekit

        first = found.reference
        layout = layout_of(open_checkpoint(first.path, first.revision))
        data = to_mergekit(found, layout)
        print_json(data) if as_json else typer.echo(dump_yaml(data), nl=False)
    elif as_json:
        print_json(found.to_json())
    else:
        typer.echo(found.to_yaml(), nl=False)


def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file [RUN/report.html beside the store].")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Write a run's report: one HTML file with figures."""
    from evomerge.report.page import write_report

    with open_store(store) as opened:
        target = out or result_folder(run, store) / "report.html"
        view = opened.run(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        typer.echo(write_report(view, target))


def methods(as_json: JsonOption = False) -> None:
    """List the merge methods with their parameters, ranges, defaults and papers."""
    from dataclasses import asdict

    from evomerge.catalogue import CATALOGUE
    from evomerge.cli.display import console, print_json, simple_table

    if as_json:
        print_json([asdict(method) for method in CATALOGUE.values()])
        return
    rows = []
    for method in CATALOGUE.values():
        needs = {"required": "base", "none": "no base", "optional": "base optional"}[method.base]
        rows.append((method.name, f"{method.title} ({needs})", "", "", method.paper))
        for p in method.parameters:
            span = ", ".join(str(c).lower() for c in p.choices) or f"{p.low:g} to {p.high:g}"
            default = "required" if p.default is None else str(p.default).lower()
            rows.append(("", f"  {p.name} (per {p.scope}): {p.doc}", span, default, ""))
    console.print(simple_table(("method", "what", "search range", "default", "paper"), rows))


COMMANDS = (runs, show, watch, recipe, report, methods)
