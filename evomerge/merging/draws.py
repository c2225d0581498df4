"""Random numbers that are a pure function of seed, key and index: no state, no order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw_keys(seed: int, key: str) -> tuple[int, int]:
    """Return the two 32-bit keys of the draws for a seed and what they are for."""
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform_codes(keys: tuple[int, int], start: int, count: int, device: torch.device) -> Tensor:
    """Return integers uniform in [0, 2**24) for the indices from `start` on, as int32.

    Counter based: the index is mixed with two 32-bit keys by the finaliser of MurmurHash3 (Appleby 2011),
    applied twice.
    """
    code = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    for word in keys:
        code ^= _signed(word)
        for shift, factor in ((16, -2048144789), (13, -1028477387)):
            code ^= _shift_right(code, shift)
            code *= factor
        code ^= _shift_right(code, 16)
    return _shift_right(code, 8)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _shift_right(code: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, which torch shifts arithmetically."""
    return (code >> bits).bitwise_and_((1 << (32 - bits)) - 1)
