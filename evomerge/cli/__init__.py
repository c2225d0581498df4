"""The `evomerge` command: thin commands over the library. Heavy imports stay inside the commands."""

from __future__ import annotations

import errno
import os
import signal
import sys

import typer

from evomerge import faults
from evomerge.cli import adapters, inspect, look, models, population, runs, service, soup, track
from evomerge.errors import LostRunError, UserError

app = typer.Typer(
    name="evomerge",
    help="Search for the best way to merge fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *runs.COMMANDS,
    *look.COMMANDS,
    *models.COMMANDS,
    *adapters.COMMANDS,
    *soup.COMMANDS,
    *inspect.COMMANDS,
    *service.COMMANDS,
    *track.COMMANDS,
):
    app.command()(command)
app.add_typer(population.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from evomerge import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    del version


_INTERRUPTED = 130

_SURROUNDINGS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose another disk"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose another place, or change its permissions"
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "choose another path"),
    errno.EIO: "check the disk",
}
"""Errors of the system that are not ours, and what the user can do."""


def _ended(number: int, frame: object) -> None:
    """Leave as on Ctrl-C, so that half-written output is removed."""
    del frame
    sys.exit(128 + number)


def main() -> None:
    """Run the command line. Exit code 2: the user can mend it; 1: our own fault; 130: interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    try:
        faults.arm(os.environ.get(faults.VARIABLE))
        app()
    except (UserError, LostRunError) as problem:
        for line in problem.lines:
            print(f"evomerge: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evomerge: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("evomerge: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as problem:
        if problem.errno not in _SURROUNDINGS:
            raise
        where = f"{problem.filename}: " if problem.filename else ""
        told = UserError(f"{where}{problem.strerror}; {_SURROUNDINGS[problem.errno]}")
        print(f"evomerge: {told}", file=sys.stderr)
        sys.exit(2)
