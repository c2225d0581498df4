"""Commands that read runs: runs, show, watch, recipe, report, methods."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomerge.cli.options import (
    JsonOption,
    ServerOption,
    StoreOption,
    TokenFileOption,
    at_service,
    open_client,
    open_store,
    result_folder,
)

if TYPE_CHECKING:
    from evomerge.catalogue import Method

RunArgument = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]


def runs(
    context: typer.Context,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a store or a service."""
    from evomerge.cli.display import console, moment, print_json, simple_table, spent
    from evomerge.cli.remote import oldest_first
    from evomerge.report.overview import overview

    if at_service(context, server, store):
        with open_client(server, token_file) as client:
            rows = oldest_first(client)
    else:
        with open_store(store) as opened:
            rows = overview(opened)["runs"]
    if as_json:
        print_json(rows)
        return
    table = [
        (
            row["name"],
            row["status"],
            spent(row),
            "-" if row["best_search_score"] is None else f"{row['best_search_score']:.3f}",
            moment(row["updated"]),
        )
        for row in rows
    ]
    console.print(
        simple_table(
            ("run", "status", "evaluations", "best search score (baselines included)", "updated"), table
        )
    )


def show(
    context: typer.Context,
    run: RunArgument,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run found."""
    from evomerge.cli.display import console, print_found, print_json
    from evomerge.report.overview import shown

    if at_service(context, server, store):
        with open_client(server, token_file) as client:
            data = client.show(run)
    else:
        with open_store(store) as opened:
            data = shown(opened, run)
    if as_json:
        print_json(data)
        return
    console.print(
        f"{data['name']}: {data['status']}, {data['evaluations']} evaluations, {data['failures']} failed"
    )
    if data["error"]:
        console.print(f"error: {data['error']}", markup=False, soft_wrap=True)
    print_found(data)
    for line in data["notes"]:
        console.print(line, markup=False, highlight=False)
    for line in data["optimizer"][-5:]:
        console.print(line, markup=False, soft_wrap=True)
    for failure in data["failed"]:
        console.print(
            f"candidate {failure['candidate']} {failure['status']}: {failure['reason']}",
            markup=False,
            soft_wrap=True,
        )


def watch(
    context: typer.Context,
    run: RunArgument,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds between looks into a store.")
    ] = 2.0,
) -> None:
    """Follow a run that another process drives, until it ends."""
    from evomerge.cli.display import Watcher
    from evomerge.cli.remote import follow_run
    from evomerge.report.overview import LIVE, one_run

    if at_service(context, server, store):
        with open_client(server, token_file) as client:
            follow_run(client, run)
        return
    seen, watcher = 0, Watcher()
    with open_store(store) as opened:
        while True:
            line = one_run(opened, run)
            view = opened.find(run)
            for event in view.events(after=seen) if view else []:
                seen = event.id
                watcher.event(event.kind, event.data)
            watcher.state(line)
            if line["status"] not in LIVE:
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
    from evomerge.report.recipes import as_mergekit, recipe_of
    from evomerge.strict import dump_yaml

    with open_store(store) as opened:
        found = recipe_of(opened.run(run), candidate)
    if format == "mergekit":
        data = as_mergekit(found)
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
    from evomerge.checkpoints.whole import made_folder
    from evomerge.report.page import write_report

    with open_store(store) as opened:
        target = out or result_folder(run, store) / "report.html"
        view = opened.run(run)
        with made_folder(target.parent):
            typer.echo(write_report(view, target))


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or show one with its parameters."""
    from dataclasses import asdict

    from evomerge.catalogue import CATALOGUE, FAMILIES, method_named
    from evomerge.cli.display import console, print_json, simple_table

    chosen = [method_named(name)] if name else list(CATALOGUE.values())
    if as_json:
        print_json([asdict(method) for method in chosen])
    elif name:
        _show_method(chosen[0])
    else:
        for family, members in FAMILIES.items():
            rows = [(method.name, method.title, _takes(method), method.paper) for method in members]
            console.print(simple_table((family, "what", "takes", "paper"), rows))
        console.print("`evomerge methods NAME` shows parameters, ranges, defaults and notes.", markup=False)


def _takes(method: Method) -> str:
    """Return what a method needs, in a few words."""
    base = {"required": "base and ", "none": "", "optional": "base or none, and "}[method.base]
    low, high = method.min_sources, method.max_sources
    count = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    return f"{base}{count}"


def _show_method(method: Method) -> None:
    from evomerge.cli.display import console, simple_table

    flags = [
        ("its order of sources has a meaning", method.ordered),
        ("looks at the whole model", method.whole_model),
        ("draws at random", method.random),
        ("mergekit has it too", method.mergekit),
    ]
    lines = [
        f"{method.name}: {method.title}",
        f"paper: {method.paper}",
        f"sources: {_takes(method)}",
        f"also: {', '.join(text for text, holds in flags if holds)}",
        f"notes: {method.notes}",
        f"not verified: {method.unverified}",
    ]
    for line in lines:
        if line.partition(": ")[2]:
            console.print(line, markup=False, soft_wrap=True)
    rows = []
    for p in method.parameters:
        span = ", ".join(str(c).lower() for c in p.choices) or f"{p.low:g} to {p.high:g}"
        default = "required" if p.default is None else str(p.default).lower()
        rows.append((p.name, f"each {p.scope}" if p.scope == "source" else "method", default, span, p.doc))
    console.print(simple_table(("parameter", "of", "default", "search range", "what"), rows))


COMMANDS = (runs, show, watch, recipe, report, methods)
