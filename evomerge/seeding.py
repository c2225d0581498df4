"""Named random streams derived from one root seed.

No generator state is ever stored: every draw comes from a stream named by what it is for and an index
(`stream(seed, "cma_es", generation)`), so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 64-bit seed in [0, 2**63) that depends on every argument, the same on any machine."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a fresh generator for one purpose; equal arguments give equal draws."""
    return np.random.Generator(np.random.PCG64(derive(seed, *purpose)))
