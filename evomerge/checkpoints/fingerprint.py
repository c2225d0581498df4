"""SHA-256 of files, remembered between processes in the user's cache folder. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evomerge.checkpoints.files import open_regular

_CACHED_FROM = 2**20  # bytes; smaller files are hashed faster than looked up
_BLOCK = 2**22  # bytes read at a time
_MAX_ENTRIES = 10_000
_SETTLED = 2_000_000_000  # nanoseconds; a file changed later than that may change again with the same mtime
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text as 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's content, hashed in threads.

    Raises:
        SourceError: A file cannot be read or is not a regular file.
    """
    known = _load()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashed = list(pool.map(lambda path: _hash(path, known), paths))
    new = {key: digest for key, digest in hashed if key and key not in known}
    if new:
        _save({**known, **new})
    return [digest for _, digest in hashed]


def remember(kind: str, path: Path, compute: Callable[[], str]) -> str:
    """Return the digest of `kind` that belongs to a file, from the cache if the file is unchanged.

    Args:
        kind: What the digest is of; part of the cache key.
        path: The file.
        compute: Called without arguments for the 64 hex digits when they are not known.
    """
    known = _load()
    key = _key(path, os.stat(path), kind)
    digest = known.get(key) if key else None
    if digest is None:
        digest = compute()
        if key:
            _save({**known, key: digest})
    return digest


def _hash(path: Path, known: dict[str, str]) -> tuple[str, str]:
    with open_regular(path) as file:
        key = _key(path, os.fstat(file.fileno()), "content")
        if key in known:
            return key, known[key]
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        return key, digest.hexdigest()


def _key(path: Path, status: os.stat_result, kind: str) -> str:
    """Return the cache key of a file as it is now; "" if it is too small or too fresh to be remembered."""
    if status.st_size < _CACHED_FROM or time.time_ns() - status.st_mtime_ns < _SETTLED:
        return ""
    return f"{kind}|{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "evomerge" / "fingerprints.json"


def _load() -> dict[str, str]:
    try:
        data = json.loads(_file().read_text("utf-8"))
        return {key: value for key, value in data.items() if _DIGEST.fullmatch(value)}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError):
        return {}  # missing or damaged: everything is hashed again


def _save(entries: dict[str, str]) -> None:
    newest = dict(list(entries.items())[-_MAX_ENTRIES:])
    with contextlib.suppress(OSError, RuntimeError):
        target = _file()
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".fingerprints-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
                json.dump(newest, file)
            os.replace(name, target)
        except OSError:
            os.unlink(name)
            raise
