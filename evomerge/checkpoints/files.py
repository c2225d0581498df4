"""Careful reading of files that others made: regular files, inside their folder, size-capped. No torch."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.errors import SourceError

LFS_POINTER = b"version https://git-lfs"


def show(value: object, limit: int = 80) -> str:
    """Return a value as one printable, ASCII-only piece of a message, cut to `limit` characters."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def broken(where: Path | str, problem: str) -> SourceError:
    """Return a SourceError `where: problem` that is sure to be one printable line."""
    return SourceError(one_line(f"{where}: {problem}"))


def one_line(text: str) -> str:
    """Return a text as one line in which every character can be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; refuse folders, pipes and devices without blocking on them.

    Raises:
        SourceError: The file is missing, unreadable, or not a regular file.
    """
    try:
        # A pipe without a writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise broken(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise broken(path, "not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        SourceError: The file cannot be read or is larger.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise broken(path, f"larger than the {limit:,} bytes allowed for this kind of file")
    return data


def parse_json(where: Path | str, data: bytes, hook: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Args:
        where: What the message names.
        data: UTF-8 text without byte order mark.
        hook: `object_pairs_hook` of the parser.

    Raises:
        SourceError: It is not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except UnicodeDecodeError:
        raise broken(where, "not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else show(str(error)).strip("'\"")
        raise broken(where, f"not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise broken(where, f"expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path, limit: int = 16 * 2**20) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises:
        SourceError: The file cannot be read, is too large, or holds no JSON object.
    """
    data = read_bytes(path, limit)
    if data.startswith(LFS_POINTER):
        raise broken(path, "this is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    return parse_json(path, data)


def inside(root: Path, name: str) -> Path:
    """Return the path of file `name` directly in folder `root`.

    Symlinks may leave the folder only as in the Hugging Face cache, where `snapshots/REVISION/NAME` points
    to `blobs/` of the repository or of the cache.

    Args:
        root: The folder, already resolved.
        name: A plain file name.

    Raises:
        SourceError: The name is a path, or the file lies elsewhere.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise broken(root, f"file name {show(name)} leads out of the checkpoint folder")
    path = root / name
    real = Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots":
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise broken(path, "is a symlink out of the checkpoint folder; copy the file into it")
    return path
