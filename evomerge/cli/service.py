"""Commands of the service: serve, submit, cancel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    shown_store,
)
from evomerge.cli.runs import ConfigArgument

if TYPE_CHECKING:
    from evomerge.service.settings import ServiceSettings


def serve(
    folder: Annotated[
        Path, typer.Option("--folder", help="The service's own files: token, logs, results, exports.")
    ] = Path("runs/service"),
    root: Annotated[
        list[Path] | None,
        typer.Option("--root", help="Where configs may name models, tasks and code; may be repeated [here]."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8642,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another name that it may be called by; may be repeated."),
    ] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Runs at once; others wait.")] = 1,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="Of a driver that died, in a row without a new outcome.")
    ] = 2,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Submit drivers as jobs of this Ray cluster: http://HEAD:8265."),
    ] = None,
    ray_python: Annotated[
        str | None, typer.Option("--ray-python", help="The interpreter on its machines [this one].")
    ] = None,
    allow_unsafe_code: Annotated[
        bool, typer.Option("--allow-unsafe-code", help="Allow tasks that execute what a model writes.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Serve runs over HTTP: submit, watch, cancel, export."""
    from evomerge.errors import UserError
    from evomerge.service.settings import ServiceSettings

    roots = []
    for path in root or [Path()]:
        if not path.is_dir():
            raise UserError(f"--root {path}: there is no such folder")
        roots.append(path.resolve())
    where = store or DEFAULT_STORE
    if "://" not in where:
        where = str(Path(where).expanduser().absolute())
    settings = ServiceSettings(
        folder=folder.absolute(),
        store=where,
        roots=tuple(roots),
        host=host,
        port=port,
        hosts=tuple(allow_host or ()),
        at_once=at_once,
        restarts=restarts,
        ray_address=ray_address,
        ray_python=ray_python or sys.executable,
        allow_unsafe_code=allow_unsafe_code,
    )
    _serve(settings)


def _serve(settings: ServiceSettings) -> None:
    from contextlib import nullcontext

    from evomerge.checkpoints.whole import made_folder
    from evomerge.cli.display import errors, warn
    from evomerge.errors import UserError
    from evomerge.service.settings import LOOPBACK

    try:
        from evomerge.service.server import serve as run
    except ModuleNotFoundError as missing:
        raise UserError(
            f"serve: the package {missing.name} is missing; pip install 'evomerge[service]'"
        ) from None

    def ready(address: str) -> None:
        errors.print(f"serving {shown_store(settings.store)} at {address}", markup=False, soft_wrap=True)
        if settings.host not in LOOPBACK:
            warn("the token is sent unencrypted; put a proxy with TLS before the service")
        errors.print(f"token: in {settings.folder / 'token'}", markup=False, soft_wrap=True)

    new = nullcontext() if "://" in settings.store else made_folder(Path(settings.store).parent)
    with new:
        run(settings, ready=ready)


def submit(
    config: ConfigArgument,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run [as in the config].")] = None,
    priority: Annotated[int, typer.Option("--priority", help="Higher ones start first.")] = 0,
    folder: Annotated[
        str | None,
        typer.Option(
            "--relative-to",
            help="What its paths are relative to, on the service's machine [the config's folder].",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--watch", help="Follow the run to its end; exit code 2 if it failed.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a run at a service."""
    from evomerge.cli.display import print_json
    from evomerge.cli.remote import follow_run
    from evomerge.config import read_data

    changes = [*(overrides or []), *([f"name={name}"] if name else [])]
    data = read_data(config)
    where = str(config.parent.resolve()) if folder is None else folder
    with open_client(server, token_file) as client:
        line = client.submit(data, folder=where, changes=changes, priority=priority)
        if follow:
            follow_run(client, line["name"])
            line = client.show(line["name"])
        elif not as_json:
            typer.echo(f"{line['name']}: {line['status']}")
    if as_json:
        print_json(line)
    if follow and line["status"] != "finished":
        raise typer.Exit(2 if line["status"] == "failed" else 130)


def cancel(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Name of the run.", show_default=False)],
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for the candidates that are running.")
    ] = False,
    store: StoreOption = None,
    server: ServerOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a run that another process drives; it can be resumed."""
    from evomerge.cli.display import print_json
    from evomerge.report.overview import one_run
    from evomerge.store.jobs import JobQueue

    if at_service(context, server, store):
        with open_client(server, token_file) as client:
            line = client.cancel(run, now=now)
    else:
        with open_store(store) as opened:
            JobQueue(opened, "").cancel(run, immediately=now)
            line = one_run(opened, run)
    if as_json:
        print_json(line)
    elif line["status"] in ("starting", "running"):
        when = "now" if now else "after the candidates that are running"
        typer.echo(f"{run}: stops {when}")
    else:
        typer.echo(f"{run}: {line['status']}")


COMMANDS = (serve, submit, cancel)
