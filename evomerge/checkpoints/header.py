"""The header of a safetensors file, checked before any library sees the file. No torch."""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.files import LFS_POINTER, broken, open_regular, parse_json, show

MAX_HEADER = 8 * 2**20
"""Largest header in bytes; real shards stay below 1 MiB."""
MAX_TENSORS = 50_000
MAX_VALUES = 1_000_000
MAX_NAME = 512
MAX_RANK = 8

BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8},
    **{"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
"""Bits of one element, by safetensors dtype."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]*")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is stored.

    Attributes:
        name: Its name in the checkpoint.
        dtype: As safetensors writes it: `F32`, `BF16`, `F16`, ...
        shape: Its dimensions; empty for a scalar.
        file: The weight file.
        offset: First byte of its data, counted from the start of the file.
        nbytes: Bytes of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> list[TensorInfo]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises:
        SourceError: The file is not safetensors, is cut off or has bytes that belong to no tensor, or its
            header is larger or stranger than any model needs.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if size < 8:
            raise broken(path, f"cut off: {size} bytes, a safetensors file has at least 8; fetch it again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER:
            large = f"header of {length:,} bytes, at most {MAX_HEADER:,} are accepted"
            raise broken(path, _foreign(start) or large)
        if length > size - 8:
            raise broken(path, f"cut off: header of {length:,} bytes in a file of {size:,}; fetch it again")
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise broken(path, f"header is not a JSON object, it starts with {show(text[:8])}")
    if text.count(b"{") > MAX_TENSORS + 2:  # before parsing: that many objects take seconds and a gigabyte
        raise broken(path, f"more tensors than the {MAX_TENSORS:,} that one file may have")
    header = parse_json(f"{path}: header", text, MAX_VALUES)
    return _checked(path, header, 8 + length, size)


def _foreign(start: bytes) -> str:
    """Return what a file that cannot be safetensors is instead, if that is known."""
    if start.startswith(LFS_POINTER):
        return "this is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
    if start.startswith(b"PK\x03\x04"):
        return "this is a zip archive, perhaps a renamed torch file; convert it to safetensors"
    if start[0] == 0x80 and start[1] in (2, 3, 4, 5):
        return "this is a renamed pickle; convert it to safetensors"
    return ""


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> list[TensorInfo]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(path, "__metadata__ must map strings to strings")
    infos = [_tensor(path, name, entry, start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = start
    for info in infos:
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise broken(path, f'data_offsets of tensor "{info.name}" {kind}')
        end += info.nbytes
    if end > size:
        raise broken(path, f"cut off: {size:,} bytes, its header needs {end:,}; fetch it again")
    if end < size:
        raise broken(path, f"{size - end:,} bytes after the last tensor; fetch it again")
    return infos


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise broken(path, f"tensor name {show(name)}: expected 1 to {MAX_NAME} letters, digits and _.:-")
    where = f'{path}: tensor "{name}"'
    if not isinstance(entry, dict) or _FIELDS - set(entry):
        raise broken(where, "expected an object with dtype, shape and data_offsets")
    if set(entry) != _FIELDS:
        raise broken(where, "has unknown fields besides dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise broken(where, f"unknown dtype {show(dtype)}; known: {', '.join(BITS)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise broken(where, f"shape {show(shape)}: expected at most {MAX_RANK} integers, none negative")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(where, f"data_offsets {show(offsets)}: expected two ascending integers")
    bits = math.prod(shape) * BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        needed = f"shape {show(shape)} of {dtype} needs {bits / 8:,} bytes"
        raise broken(where, f"{needed}, data_offsets give {nbytes:,}")
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _counts(value: Any) -> bool:
    # bool is an int to isinstance, and true is no dimension; beyond 2**63 no file can hold it
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
