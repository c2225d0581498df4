"""Write a checkpoint folder: streamed, sharded, and there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from evomerge.checkpoints.header import BITS
from evomerge.checkpoints.whole import partial_of, remove_stale, sync
from evomerge.errors import UserError
from evomerge.faults import reached

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Torch's dtype for each safetensors dtype that can be written."""

MAX_SHARD_BYTES = 4 * 2**30
"""Largest weight file unless another size is asked for."""

PlanEntry = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""


@dataclass
class _Shard:
    """A weight file: its name, the byte offset of each tensor in it, and what is still to come."""

    name: str
    size: int
    header: bytes
    offsets: dict[str, int]
    missing: set[str]
    file: BinaryIO | None = field(default=None)


class Writer:
    """Writes a checkpoint folder under a temporary name beside the target and renames it when complete.

    Used as a context manager; leaving it without `commit` removes everything written. Memory: one tensor.

    Args:
        target: The folder to be made; it must not exist, its parent must.
        plan: Every tensor: name, safetensors dtype and shape.
        max_shard_bytes: Largest weight file, in bytes of tensor data; a larger tensor gets a file of its own.
        metadata: The metadata of the weight files; default: `{"format": "pt"}`, which transformers needs.

    Raises:
        UserError: The target exists or cannot be written, or the disk is too full for the plan.
        ValueError: The plan names a tensor twice or has a dtype that cannot be written.
    """

    def __init__(
        self,
        target: Path,
        plan: Sequence[PlanEntry],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        check_target(target)
        self._target = target.absolute()
        self._folder = partial_of(self._target)
        self._plan = {name: (dtype, tuple(shape)) for name, dtype, shape in plan}
        if len(self._plan) < len(plan) or any(dtype not in DTYPES for _, dtype, _ in plan):
            raise ValueError("the plan names a tensor twice or has a dtype that cannot be written")
        self._shards = _shards(plan, max_shard_bytes, dict(metadata or {"format": "pt"}))
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._names = {shard.name for shard in self._shards}
        self._written: list[Path] = []
        with self._one_line():
            self._check_space()
            remove_stale(self._target)
            self._folder.mkdir()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of the plan; any order will do, the order of the plan is the fastest.

        Args:
            name: Its name in the plan.
            tensor: Of the planned dtype and shape, on any device.

        Raises:
            ValueError: It is not in the plan, was added before, or has another dtype or shape.
            UserError: It cannot be written, for example because the disk is full.
        """
        shard = self._shard_of.get(name)
        if shard is None or name not in shard.missing:
            raise ValueError(f'tensor "{name}" is not in the plan or was added before')
        dtype, shape = self._plan[name]
        if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f'tensor "{name}": planned {dtype} {shape}, got {got}')
        with self._one_line():
            file = self._opened(shard)
            file.seek(shard.offsets[name])
            data = tensor.detach().cpu().contiguous().reshape(-1)
            if data.numel():
                file.write(data.view(torch.uint8).numpy().data)
            shard.missing.discard(name)
            if not shard.missing:
                self._close(shard)
        reached("tensor_written")

    def add_json(self, name: str, data: Any) -> None:
        """Write a JSON file as transformers does (two spaces, sorted keys, newline at the end).

        Raises:
            ValueError: The name is a path or is taken.
            UserError: The file cannot be written.
        """
        self.add_text(name, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def add_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file.

        Raises:
            ValueError: The name is a path or is taken.
            UserError: The file cannot be written.
        """
        path = self._claim(name)
        with self._one_line():
            path.write_bytes(text.encode("utf-8"))

    def copy_file(self, source: Path) -> None:
        """Copy the content of a file under its own name.

        Raises:
            ValueError: The name is taken.
            UserError: The file cannot be read or written.
        """
        path = self._claim(source.name)
        with self._one_line():
            shutil.copyfile(source, path)

    def commit(self) -> Path:
        """Make the folder durable, give it its name, and return that.

        Raises:
            ValueError: A planned tensor is missing.
            UserError: It cannot be written, or the target has come into being meanwhile.
        """
        missing = [name for shard in self._shards for name in shard.missing]
        if missing:
            raise ValueError(f'{len(missing)} planned tensors were not added, first "{missing[0]}"')
        if len(self._shards) > 1:
            self.add_json("model.safetensors.index.json", self._index())
        check_target(self._target)
        with self._one_line():
            for path in self._written:
                sync(path)
            sync(self._folder)
            reached("export_written")
            os.rename(self._folder, self._target)
            reached("exported")
            sync(self._target.parent)
        return self._target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards:
            if shard.file is not None:
                # What is still buffered goes with the folder.
                with contextlib.suppress(OSError):
                    shard.file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = "free some space or choose another disk" if full else "choose another folder"
            reason = error.strerror or str(error)
            raise UserError(f"{self._target}: cannot be written ({reason}); {hint}") from None

    def _check_space(self) -> None:
        needed = sum(shard.size for shard in self._shards)
        free = shutil.disk_usage(self._target.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, {free:,} are free")

    def _claim(self, name: str) -> Path:
        if Path(name).name != name or name in ("", "..") or name in self._names:
            raise ValueError(f'"{name}" is a path or is taken')
        self._names.add(name)
        self._written.append(self._folder / name)
        return self._folder / name

    def _opened(self, shard: _Shard) -> BinaryIO:
        if shard.file is None:
            shard.file = (self._folder / shard.name).open("wb")
            shard.file.write(shard.header)
        return shard.file

    def _close(self, shard: _Shard) -> None:
        if shard.file is not None:
            shard.file.close()
            self._written.append(self._folder / shard.name)

    def _index(self) -> dict[str, Any]:
        sizes = [(math.prod(shape), BITS[dtype]) for dtype, shape in self._plan.values()]
        return {
            "metadata": {
                "total_parameters": sum(count for count, _ in sizes),
                "total_size": sum(count * bits // 8 for count, bits in sizes),
            },
            "weight_map": {name: shard.name for name, shard in self._shard_of.items()},
        }


def check_target(target: Path) -> None:
    """Check that a folder can be made at `target`.

    Raises:
        UserError: It exists (also as a file or a dangling link), or its parent is missing or not writable.
    """
    parent = target.absolute().parent
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; choose another folder or remove it")
    if not parent.is_dir():
        raise UserError(f"{target}: its parent folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target}: its parent folder {parent} is not writable; choose another")


def _shards(plan: Sequence[PlanEntry], limit: int, metadata: Mapping[str, str]) -> list[_Shard]:
    """Fill shards in the order of the plan, each up to `limit` bytes."""
    groups: list[list[PlanEntry]] = [[]]
    filled = 0
    for entry in plan:
        nbytes = _nbytes(entry)
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += nbytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [
        _shard(name, group, metadata)
        for name, group in zip(names if count > 1 else ["model.safetensors"], groups, strict=True)
    ]


def _shard(name: str, entries: Sequence[PlanEntry], metadata: Mapping[str, str]) -> _Shard:
    header: dict[str, Any] = {"__metadata__": metadata}
    relative: dict[str, int] = {}
    end = 0
    # Wide elements first, so that every tensor is aligned for its dtype.
    for entry in sorted(entries, key=lambda entry: -BITS[entry[1]]):
        tensor, dtype, shape = entry
        relative[tensor] = end
        end += _nbytes(entry)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [relative[tensor], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {tensor: start + relative[tensor] for tensor, _, _ in entries}
    return _Shard(name, start + end, struct.pack("<Q", len(text)) + text, offsets, set(offsets))


def _nbytes(entry: PlanEntry) -> int:
    return math.prod(entry[2]) * BITS[entry[1]] // 8
