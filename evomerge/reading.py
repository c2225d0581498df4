"""Reading files that others made: regular files only, within limits, and JSON without surprises."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.errors import UserError

MOST_VALUES = 400_000
"""Most values of a JSON text where nothing else is said; each takes about a hundred bytes when parsed."""

MOST_LEVELS = 64
"""Deepest nesting of a JSON text."""

_HALF = re.compile(rb"\\u[dD][89abAB]")


@contextmanager
def open_regular(path: Path, error: type[UserError]) -> Iterator[BinaryIO]:
    """Open a file for reading; refuse folders, pipes and devices without blocking on them.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        UserError: The file is missing, unreadable, or not a regular file.
    """
    try:
        # A pipe without a writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: cannot be read ({reason})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, limit: int, error: type[UserError]) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        limit: Most bytes that it may have.
        error: What to raise.

    Raises:
        UserError: The file cannot be read or is larger.
    """
    with open_regular(path, error) as file:
        try:
            data = file.read(limit + 1)
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem.strerror})") from None
    if len(data) > limit:
        raise error(f"{path}: larger than the {limit:,} bytes allowed for this kind of file")
    return data


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that path; false also for what can be no path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, NUL
        return False


def parse_json(data: bytes, where: str, error: type[UserError], *, most: int = MOST_VALUES) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Args:
        data: UTF-8 text without byte order mark.
        where: What the message names.
        error: What to raise.
        most: Most values, roughly: commas and opening brackets are counted before anything is parsed.

    Raises:
        UserError: It is not UTF-8, not JSON, too large, nested too deeply, has a key twice, halves of
            characters, or is not an object.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > most:
        raise error(f"{where}: more values than the {most:,} allowed for this kind of file")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise error(f"{where}: not UTF-8 text") from None
    except _Repeated as problem:
        raise error(f"{where}: duplicate key {ascii(problem.key)[:80]}; keep one of them") from None
    except (ValueError, RecursionError) as problem:
        deep = isinstance(problem, RecursionError)
        reason = "nested too deeply" if deep else str(problem)[:80]
        raise error(f"{where}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {type(value).__name__}")
    _check_depth(value, where, error)
    if _HALF.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise error(f"{where}: a text holds half a character (a lone surrogate)") from None
    return value


class _Repeated(Exception):
    """A key of a JSON object came twice; not a ValueError, which means other things here."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _check_depth(value: dict[str, Any], where: str, error: type[UserError]) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise error(f"{where}: not valid JSON (nested more than {MOST_LEVELS} levels deep)")
