"""Files and folders that appear as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from evomerge.errors import UserError
from evomerge.faults import reached


def partial_of(target: Path) -> Path:
    """Return the name under which this process writes a file or folder."""
    return target.with_name(f".{target.name}.partial-{platform.node()}-{os.getpid()}")


def remove_stale(target: Path) -> None:
    """Remove what killed processes of this machine left of the same target."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-{glob.escape(platform.node())}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def made_folder(folder: Path, mode: int = 0o777, error: type[UserError] = UserError) -> Iterator[None]:
    """Make a folder with its parents for what the block puts there.

    If the block fails, those that were made and are empty are removed again. What others put there in the
    meantime stays, since only an empty folder can be removed so.

    Args:
        folder: The folder; may be there already.
        mode: Of the folder itself, if it is made.
        error: What to raise.

    Raises:
        UserError: It cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            made += [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(mode, parents=True, exist_ok=True)
        except OSError as problem:
            raise error(f"{folder}: cannot be made ({problem.strerror}); give another folder") from None
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()
        raise


def why_not_made(folder: Path) -> str:
    """Return why a folder cannot be made or written; empty if nothing is against it."""
    try:
        above = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not above.is_dir():
            return f"{above} is no directory"
        return "" if os.access(above, os.W_OK) else f"the directory {above} is not writable"
    except (OSError, ValueError) as problem:
        return getattr(problem, "strerror", None) or str(problem)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(target: Path, data: bytes) -> None:
    """Write a file, in the place of one that is there; OSError leaves that one as it was."""
    remove_stale(target)
    partial = partial_of(target)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reached("file_written")
        os.replace(partial, target)
    except BaseException:
        remove(partial)
        raise
