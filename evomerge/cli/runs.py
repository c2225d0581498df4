"""Commands that drive runs: run, resume, validate, demo."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.options import (
    DEFAULT_STORE,
    JsonOption,
    ServerOption,
    SetOption,
    StoreOption,
    TokenFileOption,
    at_service,
    open_client,
    open_store,
    result_folder,
    shown_store,
)

if TYPE_CHECKING:
    from evomerge.config import RunConfig
    from evomerge.store import RunView, Store

ConfigArgument = Annotated[Path, typer.Argument(help="The run config, a YAML file.", show_default=False)]
BaseOption = Annotated[
    Path | None,
    typer.Option("--relative-to", help="What its paths are relative to [the config's folder]."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Number of workers.")]


def run(
    config: ConfigArgument,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run [as in the config].")] = None,
    workers: WorkersOption = None,
    relative_to: BaseOption = None,
    overrides: SetOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a search and drive it to the end."""
    from evomerge.config import read_config

    given = list(overrides or [])
    given += [f"name={name}"] if name else []
    given += [f"workers.count={workers}"] if workers else []
    parsed = read_config(config, given)
    base_dir = (relative_to or config.parent).resolve()
    where = store or _store_of(parsed, base_dir) or DEFAULT_STORE
    with open_store(where, create=True) as opened:
        view = drive(parsed, base_dir, opened)
        finish(view, opened, where, as_json=as_json)


def resume(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Name of the run.", show_default=False)],
    evaluations: Annotated[int | None, typer.Option("--evaluations", min=1, help="New budget.")] = None,
    workers: WorkersOption = None,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Go on although sources or tasks changed.")
    ] = False,
    overrides: SetOption = None,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that was stopped, killed or finished; at a service, queue it."""
    if at_service(context, server, store):
        from evomerge.cli.remote import queue_again

        wish = {"evaluations": evaluations, "workers": workers, "changes": list(overrides or [])}
        with open_client(server, token_file) as client:
            queue_again(client, run, {**wish, "accept_drift": accept_drift}, as_json=as_json)
        return
    given = list(overrides or [])
    given += [f"budget.evaluations={evaluations}"] if evaluations else []
    given += [f"workers.count={workers}"] if workers else []
    with open_store(store) as opened:
        _check_budget(opened, run, evaluations)
        view = continued(run, opened, given, accept_drift=accept_drift)
        finish(view, opened, store or DEFAULT_STORE, as_json=as_json)


def _check_budget(store: Store, name: str, evaluations: int | None) -> None:
    from evomerge.cli.display import warn
    from evomerge.report.overview import one_run

    done = one_run(store, name)["evaluations"]
    if evaluations is not None and evaluations <= done:
        warn(f"--evaluations {evaluations}: the run has {done} already, so nothing more is searched")


def drive(config: RunConfig, base_dir: Path, store: Store) -> RunView:
    """Start a run with progress on standard error."""
    from evomerge import drive as driver
    from evomerge.cli.display import Listener

    with Listener() as listener:
        return driver.start(config, base_dir, store, listener=listener, notice=listener.notice)


def continued(
    name: str, store: Store, overrides: Sequence[str] = (), *, accept_drift: bool = False
) -> RunView:
    """Go on with a run, with progress on standard error."""
    from evomerge import drive as driver
    from evomerge.cli.display import Listener

    with Listener() as listener:
        return driver.resume(
            name,
            store,
            overrides=overrides,
            accept_drift=accept_drift,
            listener=listener,
            notice=listener.notice,
        )


def finish(view: RunView, store: Store, where: str, *, as_json: bool) -> None:
    """Write what the config asks for and print what was found; `where` is the store as it was named."""
    from evomerge.cli.display import console, print_found, print_json
    from evomerge.report.overview import shown

    data = shown(store, view.name)
    if not as_json:
        print_found(data)  # first, because the files may meet a full disk
    files = _outputs(view, data, where) if view.status == "finished" else {}
    if as_json:
        print_json({**data, "files": {name: str(path) for name, path in files.items()}})
        return
    for kind, path in files.items():
        console.print(f"{kind}: {path}", soft_wrap=True, markup=False)
    place = shown_store(where)
    option = f" --store {place}" if where != DEFAULT_STORE else ""
    if option:
        console.print(f"store: {place}", soft_wrap=True, markup=False)
    if view.status != "finished":
        console.print(f"run {view.name} is {view.status}")
        step = f"evomerge resume {view.name}{option}"
    elif "model" in files or not (data["gain"] and data["gain"]["shown"]):
        longer = 2 * max(data["evaluations"], int(view.config["budget"]["evaluations"]))
        step = f"evomerge resume {view.name} --evaluations {longer}{option}    # search on"
    else:
        step = f"evomerge export {view.name} OUT{option}"
    itself = f"{sys.executable} -m evomerge" if sys.argv[0].endswith("__main__.py") else sys.argv[0]
    command = "evomerge" if shutil.which("evomerge") else itself
    console.print(f"next: {step.replace('evomerge', command, 1)}", soft_wrap=True, markup=False)
    if view.status == "stopped":
        raise typer.Exit(130)


def _outputs(view: RunView, data: Mapping[str, Any], store: str) -> dict[str, Path]:
    """Write the report and the model where the config says so; a longer search may have another winner."""
    from evomerge.checkpoints.whole import made_folder
    from evomerge.config import OutputSettings

    output = OutputSettings.model_validate(view.config["output"])
    folder = Path(output.folder) if output.folder else result_folder(view.name, store)
    written: dict[str, Path] = {}
    if output.report:
        from evomerge.report.page import write_report

        with made_folder(folder):
            write_report(view, folder / "report.html")
        written["report"] = folder / "report.html"
    if output.export:
        from evomerge.report.export import export_candidate

        target = folder / f"model-{data['best'] and data['best']['candidate']}"
        if not target.exists():
            with made_folder(folder):
                export_candidate(view, target)
        written["model"] = target
    return written


def _store_of(config: RunConfig, base_dir: Path) -> str | None:
    if config.store is None or "://" in config.store:
        return config.store
    return str(base_dir / config.store)


def validate(
    config: ConfigArgument,
    relative_to: BaseOption = None,
    overrides: SetOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a config and say what a run would do."""
    from evomerge.cli.display import console, print_json, simple_table
    from evomerge.config import read_config
    from evomerge.report.estimate import estimate
    from evomerge.sourcing import names_runs, with_recipes

    parsed, base_dir = read_config(config, overrides or []), (relative_to or config.parent).resolve()
    if names_runs(parsed):
        with open_store(store or _store_of(parsed, base_dir)) as opened:
            parsed = with_recipes(parsed, base_dir, opened)
    else:
        parsed = with_recipes(parsed, base_dir, None)
    found = estimate(parsed, base_dir)
    if as_json:
        print_json(found)
        return
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    console.print(simple_table(("what", "value"), [(k, v) for k, v in found["summary"].items()]))
    console.print("The config is valid.")


def schema() -> None:
    """Print the JSON schema of the config file, for editors."""
    from evomerge.cli.display import print_json
    from evomerge.config import json_schema

    print_json(json_schema())


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the search.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of workers.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Run the whole job on tiny experts that it trains, offline."""
    from evomerge.cli.display import training
    from evomerge.config import read_config
    from evomerge.demo.run import prepare

    with training() as stage:
        config = prepare(folder, seed=seed, workers=workers, progress=stage)
    parsed = read_config(config)
    where = str(folder / "evomerge.db")
    with open_store(where, create=True) as opened:
        view = opened.find(parsed.name)
        if view is None:
            view = drive(parsed, folder.resolve(), opened)
        elif view.status != "finished":
            view = continued(parsed.name, opened)
        finish(view, opened, where, as_json=as_json)


COMMANDS = (demo, run, resume, validate, schema)
