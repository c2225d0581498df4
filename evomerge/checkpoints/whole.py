"""Files and folders that appear as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
from pathlib import Path

import psutil

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
