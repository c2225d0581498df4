"""The demo's run: the tiny world, and a config that searches it like any other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.demo.world import World, build_world
from evomerge.strict import dump_yaml

HEADER = """\
# Written by `evomerge demo`. It is an ordinary run config: change it, give it another name and output folder
# (relative to where the command is called), and try
#   evomerge run {path} --store {store}
"""


def demo_config(world: World, folder: Path, *, seed: int, workers: int) -> dict[str, Any]:
    """Return the demo's run config as plain data; paths are relative to `folder`."""

    def relative(path: Path) -> str:
        return f"./{path.resolve().relative_to(folder.resolve())}"

    return {
        "name": f"demo-{seed}",
        "seed": seed,
        "sources": {
            "base": {"name": "base", "path": relative(world.base)},
            "models": [{"name": name, "path": relative(path)} for name, path in world.experts.items()],
        },
        "space": {
            "method": "task_arithmetic",
            "parameters": {"weight": {"low": 0.0, "high": 1.0}},
        },
        "optimizer": {"name": "cma_es", "population": 8},
        "fitness": {
            "include_paths": [relative(world.tasks_path)],
            "tasks": list(world.tasks),
            "documents": {"search": 100, "select": 100, "test": "rest"},
        },
        "budget": {"evaluations": 96, "finalists": 9},
        "workers": {"count": workers, "cpus": 1},
        "output": {"folder": f"{folder}/result-{seed}", "export": True, "report": True},
    }


def prepare(folder: Path, *, seed: int, workers: int, progress: Callable[[str, int, int], None]) -> Path:
    """Make the world, unless it is there already, and the config of one search in it.

    Args:
        folder: Where everything of the demo goes.
        seed: Of the search; the world is always the same.
        workers: Number of workers.
        progress: Called with what is trained, steps done and steps in all.

    Returns:
        The config file.
    """
    # Where other programs compete for the cores, OpenMP threads that wait by spinning slow training tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    world = build_world(folder / "world", progress=progress)
    path = folder / f"demo-{seed}.yaml"
    text = dump_yaml(demo_config(world, folder, seed=seed, workers=workers))
    path.write_text(HEADER.format(path=path, store=folder / "evomerge.db") + text)
    return path
