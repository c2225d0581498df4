"""The service's own folder: who it is, its token, and that it is the only one there."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.checkpoints.whole import made_folder, remove
from evomerge.errors import UserError

LOCK = "lock"
TOKEN = "token"  # noqa: S105 (a file's name)
IDENTITY = "identity"
FILES = (LOCK, TOKEN, IDENTITY)
"""What a start makes."""

LEAST_TOKEN = 32


@contextmanager
def own_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Make the folder, readable by its owner only, and hold it for a block that starts a service there.

    Yields what the block calls once the service has begun. If it fails before, the files that were made are
    removed, and the folder if nothing else is in it.

    Raises:
        UserError: It cannot be made or written, or another process holds it.
    """
    new = [folder / name for name in FILES if not os.path.lexists(folder / name)]
    with made_folder(folder, mode=0o700):
        if not os.access(folder, os.W_OK):
            raise UserError(f"--folder {folder}: is not writable; give another folder")
        with only_one(folder):
            try:
                yield new.clear
            except BaseException:
                for path in new:
                    remove(path)
                raise


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder; a second service on it is refused.

    Raises:
        UserError: Another process holds it.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"{folder}: process {pid} serves it already; stop that one, or give another --folder"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def written_once(path: Path, text: str) -> str:
    """Write a file that only its owner may read, unless it is there; return what it holds.

    Raises:
        UserError: Others may read or write it, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    except OSError as problem:
        raise UserError(f"{path}: cannot be written: {problem.strerror}") from None
    else:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
    return read_secret(path)


def read_secret(path: Path) -> str:
    """Return what a file holds that only its owner may read.

    Raises:
        UserError: Others may read or write it, or it cannot be read.
    """
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise UserError(f"{path}: others may read it; run: chmod 600 {path}")
            return file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is no plain text"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def token_of(folder: Path) -> str:
    """Return the folder's token, made at the first call: 256 random bits.

    Raises:
        UserError: The file is too open, or what it holds is too short to be a secret.
    """
    path = folder / TOKEN
    token = written_once(path, secrets.token_urlsafe(32))
    if len(token) < LEAST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(
            f"{path}: expected one word of at least {LEAST_TOKEN} characters; delete the file for a new token"
        )
    return token


def identity_of(folder: Path) -> str:
    """Return the name under which this service takes jobs, made at the first call."""
    return written_once(folder / IDENTITY, secrets.token_hex(8))
