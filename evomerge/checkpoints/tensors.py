"""Tensor data of a checkpoint: mapped into memory, and scanned for values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.checkpoints.files import broken
from evomerge.checkpoints.header import TensorInfo

_CHUNK = 2**22  # elements; a few megabytes stay in the processor's cache between its two passes


def open_file(path: Path) -> Any:
    """Return an open `safetensors` handle whose tensors are views of the mapped file.

    Raises:
        SourceError: The library cannot open it.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise broken(path, f"cannot be opened ({error})") from None


def load(handle: Any, info: TensorInfo) -> torch.Tensor:
    """Return one tensor, of shape `info.shape`, without copying it.

    The pages are private: writing into the tensor does not change the file.

    Raises:
        SourceError: The library refuses the tensor, for example a dtype that torch lacks.
    """
    try:
        tensor: torch.Tensor = handle.get_tensor(info.name)
    except (SafetensorError, RuntimeError, TypeError, OSError) as error:
        raise broken(info.file, f'tensor "{info.name}" cannot be read ({error})') from None
    return tensor


def first_non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first float tensor that holds NaN or infinity; None if all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not _finite(tensor):
            return name
    return None


def _finite(tensor: torch.Tensor) -> bool:
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        if chunk.numel() == 0:
            continue
        # NaN goes through aminmax, so two numbers tell; it is many times faster than isfinite().all().
        wide = chunk.float() if chunk.itemsize == 1 else chunk
        if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(wide)):
            return False
    return True
