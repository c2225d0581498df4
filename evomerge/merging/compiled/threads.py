"""Dividing a loop among threads: as many as torch is set to use, which is a worker's share of the cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

GRAIN = 1 << 18
"""Elements that are worth a thread of their own: about a tenth of a millisecond of work."""

ALIGNED = 1 << 14
"""Parts begin at multiples of this; blocks of sums have this size."""

_pool: ThreadPoolExecutor | None = None
_size = 0


def spread(work: Callable[[int, int], object], count: int) -> None:
    """Call `work(start, stop)` for parts that make up `range(count)`, at once on several threads.

    `work` must not hold the GIL to gain from it. What it raises is raised here.
    """
    threads = max(1, min(torch.get_num_threads(), count // GRAIN))
    if threads == 1:
        if count:
            work(0, count)
        return
    step = -(-count // (threads * ALIGNED)) * ALIGNED
    parts = [(start, min(start + step, count)) for start in range(0, count, step)]
    futures = [_executor(threads - 1).submit(work, *part) for part in parts[1:]]
    work(*parts[0])
    for future in futures:
        future.result()


def _executor(size: int) -> ThreadPoolExecutor:
    """Return the process's own pool, made again larger when more threads are asked for."""
    global _pool, _size
    if _pool is None or _size < size:
        _pool, _size = ThreadPoolExecutor(size, thread_name_prefix="merge"), size
    return _pool
