"""Reading and writing one element at an address as float32, for each dtype that models are stored in."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

njit = numba.njit(nogil=True, error_model="numpy")
summing = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
"""For sums over a fixed range, which may then be made in vectors."""

_ABS = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_QUIET_NAN = np.uint32(0x7FC0)
_HALF = np.uint32(0x7FFF)
_ONE, _16 = np.uint32(1), np.uint32(16)


def _reader(numba_type: Any, llvm_type: Any) -> Any:
    """Return a function of (address, index) that reads memory which nobody writes while the loop runs."""

    @intrinsic
    def read(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start = builder.inttoptr(arguments[0], llvm_type.as_pointer())
            value = builder.load(builder.gep(start, [arguments[1]]))
            # What nobody writes needs no check against the output's address, however many inputs there are.
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
            if isinstance(llvm_type, ir.HalfType):
                value = builder.fpext(value, ir.FloatType())
            return value

        return numba_type(types.int64, types.int64), generate

    return read


def _writer(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def write(context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = arguments[2]
            if isinstance(llvm_type, ir.HalfType):
                value = builder.fptrunc(value, llvm_type)
            start = builder.inttoptr(arguments[0], llvm_type.as_pointer())
            builder.store(value, builder.gep(start, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return write


def _cast(source: Any, target: Any, llvm_type: Any) -> Any:
    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_type)

        return target(source), generate

    return cast


as_float = _cast(types.uint32, types.float32, ir.FloatType())
"""The float32 that 32 bits stand for."""
as_bits = _cast(types.float32, types.uint32, ir.IntType(32))
"""The 32 bits of a float32."""

read_codes = _reader(types.uint16, ir.IntType(16))
_read_float32 = _reader(types.float32, ir.FloatType())
_read_float16 = _reader(types.float32, ir.HalfType())
_write_float32 = _writer(types.float32, ir.FloatType())
_write_float16 = _writer(types.float32, ir.HalfType())
_write_16_bits = _writer(types.uint16, ir.IntType(16))


@njit
def _read_bfloat16(address, index):
    return as_float(np.uint32(np.uint32(read_codes(address, index)) << _16))


@njit
def _write_bfloat16(address, index, value):
    bits = as_bits(value)
    # To the nearest, of two equally near ones to the even.
    rounded = np.uint32(np.uint32(bits + _HALF + np.uint32(np.uint32(bits >> _16) & _ONE)) >> _16)
    kept = _QUIET_NAN if np.uint32(bits & _ABS) > _INFINITY else rounded
    _write_16_bits(address, index, np.uint16(kept))


READERS: dict[torch.dtype, Any] = {
    torch.float32: _read_float32,
    torch.bfloat16: _read_bfloat16,
    torch.float16: _read_float16,
}
"""Functions of (address, index) that return float32."""

WRITERS: dict[torch.dtype, Any] = {
    torch.float32: _write_float32,
    torch.bfloat16: _write_bfloat16,
    torch.float16: _write_float16,
}
"""Functions of (address, index, float32 value); half precision is rounded to the nearest, even on a tie."""


def takes(*tensors: Tensor) -> bool:
    """Whether the loops of this package can read and write these tensors."""
    return all(tensor.device.type == "cpu" and tensor.dtype in READERS for tensor in tensors)


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Return where the tensors' data begins.

    Raises:
        RuntimeError: One is not contiguous, and no view of it is flat.
    """
    return tuple(tensor.view(-1).data_ptr() for tensor in tensors)
