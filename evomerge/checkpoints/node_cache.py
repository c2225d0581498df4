"""Copies of sources on a node's own disk, shared by its workers. No torch.

An entry is a folder named by the source's fingerprint. Its lock file is held shared by every worker that uses
the entry, and exclusively by one that makes or removes it; the kernel lets go of it when a worker dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from evomerge.checkpoints.source import Checkpoint, resolve
from evomerge.errors import SourceError, UserError
from evomerge.recipe import SourceRef

FOLDER, LIMIT = "EVOMERGE_SOURCE_CACHE", "EVOMERGE_SOURCE_CACHE_GIB"
"""Variables of a node: the cache's folder, and the most that it may hold in GiB."""

_KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
_log = logging.getLogger(__name__)


class NodeCache:
    """A cache folder, and what this process uses of it.

    Args:
        folder: Where it is, on a local disk.
        most_bytes: Most bytes of all entries; None: as the disk has room.
    """

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        self._folder, self._most = folder, most_bytes
        self._held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_node(cls, environment: Mapping[str, str]) -> NodeCache | None:
        """Return the cache that the node's variables name, None without.

        Raises:
            UserError: The limit is no number above 0, or the folder cannot be made.
        """
        folder, limit = environment.get(FOLDER, ""), environment.get(LIMIT, "")
        if not folder:
            return None
        try:
            most = int(float(limit) * 2**30) if limit else None
            if most is not None and most <= 0:
                raise ValueError
        except (ValueError, OverflowError):
            raise UserError(f"{LIMIT}: expected GiB above 0, got {limit!r}") from None
        try:
            return cls(Path(os.path.expandvars(folder)).expanduser().absolute(), most)
        except OSError as problem:
            raise UserError(f"{FOLDER}: {folder}: {problem.strerror}; name a local folder") from None

    def localized(self, ref: SourceRef, base_dir: Path) -> SourceRef:
        """Return a source with the path of its copy, which is made if there is none.

        A source that is a recipe has its own sources copied. Adapters on a base are read where they lie; so
        is everything for which there is no room.

        Args:
            ref: The source with its fingerprint.
            base_dir: What its path is relative to.

        Raises:
            SourceError: It is gone, or no longer what its fingerprint says.
        """
        if ref.recipe is not None:
            recipe = ref.recipe
            changes: dict[str, object] = {
                "sources": tuple(self.localized(source, base_dir) for source in recipe.sources)
            }
            if recipe.base is not None:
                changes["base"] = self.localized(recipe.base, base_dir)
            return ref.model_copy(update={"recipe": recipe.model_copy(update=changes)})
        if ref.fingerprint is None or not self._plain(ref, base_dir):
            return ref
        found = self._entry(ref, ref.fingerprint, base_dir)
        return ref if found is None else ref.model_copy(update={"path": str(found), "revision": None})

    def close(self) -> None:
        """Let go of the entries in use."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    @staticmethod
    def _plain(ref: SourceRef, base_dir: Path) -> bool:
        """Whether a source is a whole checkpoint in a folder or on the hub."""
        folder = base_dir / Path(ref.path).expanduser()
        return (folder / "config.json").is_file() if folder.is_dir() else "+" not in ref.path

    def _entry(self, ref: SourceRef, fingerprint: str, base_dir: Path) -> Path | None:
        """Return the entry, held shared by this process; None if there is no room for it."""
        entry = self._folder / fingerprint
        if fingerprint in self._held:
            return entry
        while True:
            lock = os.open(self._lock(fingerprint), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if entry.is_dir() and _holds(entry, fingerprint):
                os.utime(self._lock(fingerprint))
                self._held[fingerprint] = lock
                return entry
            os.close(lock)
            with self._alone(fingerprint, wait=True):
                made = (entry.is_dir() and _holds(entry, fingerprint)) or self._make(
                    ref, fingerprint, base_dir
                )
            if not made:
                return None

    def _make(self, ref: SourceRef, fingerprint: str, base_dir: Path) -> bool:
        """Copy a source, all or nothing; return False if there is no room. The entry's lock is held."""
        origin = Path(os.path.realpath(resolve(ref.path, ref.revision, base_dir=base_dir)))
        files = [file for file in sorted(origin.iterdir()) if file.suffix in _KINDS and file.is_file()]
        entry, partial = self._folder / fingerprint, self._folder / f".{fingerprint}"
        for left in (entry, partial):  # damaged, or of a worker that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not self._make_room(sum(file.stat().st_size for file in files), fingerprint):
            _log.warning("source %s: no room in %s; it is read from %s", ref.name, self._folder, origin)
            return False
        partial.mkdir()
        try:
            for file in files:
                shutil.copyfile(file, partial / file.name)
            if not _holds(partial, fingerprint):
                raise SourceError(
                    f"source {ref.name} ({origin}): it has changed since the run began; restore it, or "
                    "resume with --accept-drift"
                )
            os.replace(partial, entry)
        except OSError as problem:
            _log.warning("source %s: %s; it is read from %s", ref.name, problem, origin)
            return False
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True

    def _make_room(self, needed: int, fingerprint: str) -> bool:
        """Remove entries that nobody uses, the least recently used first, until there is room."""
        entries = [entry for entry in self._folder.iterdir() if entry.is_dir() and entry.name[0] != "."]
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        for entry in sorted(entries, key=lambda entry: self._lock(entry.name).stat().st_mtime):
            if self._fits(needed, sum(sizes.values())):
                break
            if entry.name == fingerprint:
                continue
            with self._alone(entry.name, wait=False) as alone:
                if alone:
                    shutil.rmtree(entry)
                    del sizes[entry]
        return self._fits(needed, sum(sizes.values()))

    def _fits(self, needed: int, held: int) -> bool:
        free = shutil.disk_usage(self._folder).free
        return needed < free and (self._most is None or held + needed <= self._most)

    def _lock(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint}.lock"

    @contextmanager
    def _alone(self, fingerprint: str, *, wait: bool) -> Iterator[bool]:
        """Hold an entry's lock exclusively; yields False if another holds it and one does not wait."""
        lock = os.open(self._lock(fingerprint), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(lock)


def _holds(folder: Path, fingerprint: str) -> bool:
    """Whether a folder is a checkpoint with this fingerprint."""
    try:
        return Checkpoint.open(folder).fingerprint == fingerprint
    except SourceError:
        return False
