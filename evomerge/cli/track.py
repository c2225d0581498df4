"""The command that shows a run in other programs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.options import StoreOption, open_store
from evomerge.errors import UserError

if TYPE_CHECKING:
    from evomerge.trackers.targets import Target

FOLLOW_SECONDS = 2.0
"""Between looks at a run that goes on."""


def track(
    run: Annotated[str, typer.Argument(help="Name of the run.", show_default=False)],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="KIND:WHERE",
            help="optuna:FILE.db, tensorboard:FOLDER, wandb:PROJECT, mlflow:FILE.db or mlflow:URL; "
            "may be repeated.",
            show_default=False,
        ),
    ],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends.")] = False,
    store: StoreOption = None,
) -> None:
    """Show a run in Optuna's dashboard, TensorBoard, W&B or MLflow; what is there already stays."""
    from evomerge.report.summary import status_of
    from evomerge.trackers.feed import Feed
    from evomerge.trackers.targets import parse_target

    def failed(target: Target, reason: str) -> None:
        raise UserError(f"tracker {target}: {reason}")

    targets = [parse_target(text, Path.cwd()) for text in to]
    with open_store(store) as opened:
        feed = Feed(opened.run(run), targets, failed)
        try:
            while True:
                view = opened.run(run)
                live = status_of(view) == "running"
                feed.pull()
                if not (follow and live):
                    break
                time.sleep(FOLLOW_SECONDS)
            if not live:
                feed.end("stopped" if view.status == "running" else view.status, view.error)
        finally:
            feed.close()
    for target in targets:
        known = min(feed.known[target], feed.step)
        typer.echo(f"{target}: {feed.step} outcomes, {feed.step - known} of them new")


COMMANDS = (track,)
