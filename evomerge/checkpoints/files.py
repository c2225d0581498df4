"""Careful reading of files that others made: regular files, inside their folder, size-capped. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from evomerge import reading
from evomerge.errors import SourceError
from evomerge.reading import MOST_VALUES

LFS_POINTER = b"version https://git-lfs"


def show(value: object, limit: int = 80) -> str:
    """Return a value as one printable, ASCII-only piece of a message, cut to `limit` characters."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def broken(where: Path | str, problem: str) -> SourceError:
    """Return a SourceError `where: problem`."""
    return SourceError(f"{where}: {problem}")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, see `evomerge.reading`; raise SourceError."""
    with reading.open_regular(path, SourceError) as file:
        yield file


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; raise SourceError."""
    return reading.read_bytes(path, limit, SourceError)


def parse_json(where: Path | str, data: bytes, most: int = MOST_VALUES) -> dict[str, Any]:
    """Return the JSON object in `data`; see `evomerge.reading.parse_json`; raise SourceError."""
    return reading.parse_json(data, str(where), SourceError, most=most)


def read_json(path: Path, limit: int = 16 * 2**20, most: int = MOST_VALUES) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes and `most` values.

    Raises:
        SourceError: The file cannot be read, is too large, or holds no JSON object.
    """
    data = read_bytes(path, limit)
    if data.startswith(LFS_POINTER):
        raise broken(path, "this is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    return parse_json(path, data, most)


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
