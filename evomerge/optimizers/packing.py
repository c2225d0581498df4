"""Numbers and arrays as JSON data, exact to the last bit."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers, lists of numbers and arrays as JSON data.

    An array becomes `{"dtype": "<f8", "shape": [2, 3], "bytes": "..."}`: little-endian, row by row, base64.
    """
    return {name: _pack(value) for name, value in values.items()}


def unpack(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `pack` was given, with writable arrays.

    Raises:
        KeyError, TypeError, ValueError: The data was not made by `pack`.
    """
    return {name: _unpack(value) for name, value in data.items()}


def _pack(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(value.shape),
        "bytes": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype} holds objects")
    flat = np.frombuffer(base64.b64decode(value["bytes"], validate=True), dtype=dtype)
    return flat.reshape(value["shape"]).astype(dtype.newbyteorder("="))
