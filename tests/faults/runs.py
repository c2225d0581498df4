"""The runs that are killed: every optimizer over every space it can search, small and cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.world import make_world, write_config

FITNESS = '''
"""A forward pass of a few tokens, other ones for each split: how near its logits are to a target."""

import hashlib
import os
import time

import torch

OFFSETS = {"search": 5, "select": 30, "test": 55}


def gate():
    """Wait at the evaluation that FITNESS_GATE=FOLDER:N names until the file `open` is in the folder."""
    folder, _, number = os.environ.get("FITNESS_GATE", "").partition(":")
    if not folder:
        return
    global begun
    begun += 1
    if begun == int(number):
        open(f"{folder}/reached", "w").close()
        while not os.path.exists(f"{folder}/open"):
            time.sleep(0.01)


begun = 0


def score(model, tokenizer, request):
    log = os.environ.get("FITNESS_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{request.recipe.digest} {request.split}\\n")
    time.sleep(float(os.environ.get("FITNESS_SECONDS", "0")))
    gate()
    offset = OFFSETS[request.split]
    tokens = torch.arange(offset, offset + 16).reshape(2, 8)
    with torch.no_grad():
        logits = model(tokens).logits[:, -1].double()
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values = -((logits - target) ** 2).flatten()[:40]
    if request.split == "search" and hashlib.sha256(request.recipe.digest.encode()).digest()[0] % 8 == 0:
        values[0] = float("nan")  # some candidates have no score
    return {"near": values.tolist()}


def solved(model, tokenizer, request):
    values = score(model, tokenizer, request)["near"]
    return {"near": [float(value > -1.0) if value == value else value for value in values]}
'''

STEERED = '''
"""The same fitness, led by files in the folder `steer`, for workers that are processes of their own."""

import ctypes
import importlib.util
import os
import pathlib
import resource
import signal
import time

HERE = pathlib.Path(__file__).parent
STEER = HERE / "steer"
found = importlib.util.spec_from_file_location("plain_fitness", HERE / "fitness.py")
plain = importlib.util.module_from_spec(found)
found.loader.exec_module(plain)


def say(word, request):
    with open(STEER / "log", "a") as file:
        file.write(f"{word} {request.recipe.digest} {request.split} {os.getpid()}\\n")


def held():
    """Wait for the file `run`, or one that names this process; return whether to poison the result."""
    here = os.getpid()
    mark = STEER / f"held-{here}"
    mark.touch()
    while not (STEER / "run").exists() and not (STEER / f"go-{here}").exists():
        time.sleep(0.01)
    mark.unlink()
    (STEER / f"go-{here}").unlink(missing_ok=True)
    return (STEER / f"poison-{here}").exists()


def steered(model, tokenizer, request):
    say("begin", request)
    poison = held()
    result = plain.score(model, tokenizer, request)
    say("end", request)
    if poison:  # a result that would be seen if it were taken
        return {"near": [value - 1000.0 for value in result["near"]]}
    return result


def first_time(what):
    """Return whether this was not asked before."""
    try:
        (STEER / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def misbehaving(model, tokenizer, request):
    kind = {0.1: "segfault", 0.2: "exit", 0.4: "memory", 0.5: "hang", 0.6: "freeze"}
    given = request.recipe.parameters.get("lambda")
    wanted = kind.get(given[0].value) if given else None
    if wanted == "segfault":
        ctypes.string_at(0)
    if wanted == "exit" and first_time("exit"):
        os._exit(0)
    if wanted == "memory":
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
        try:
            bytearray(256 << 20)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    if wanted == "freeze" and first_time("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if wanted == "hang" and first_time("hang"):
        ctypes.PyDLL(None).sleep(3600)  # keeps the interpreter's lock
    return plain.score(model, tokenizer, request)
'''

ODD = '''
"""Scores good sources, then returns one odd thing after another."""

import numpy as np


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__()


def raising(problem):
    raise problem


THINGS = {
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus inf": lambda: [1e9, float("-inf")],
    "huge": lambda: [1e308, 1e308],
    "none": lambda: None,
    "text": lambda: "0.5",
    "bool": lambda: True,
    "complex": lambda: 1j,
    "empty": lambda: {},
    "empty list": lambda: [],
    "ragged": lambda: [[1.0, 2.0], [3.0]],
    "nested": lambda: {"a": {"b": 1.0}},
    "plane": lambda: np.ones((2, 2)),
    "names": lambda: {None: [1.0], 3: [None]},
    "error": lambda: raising(Odd(1, 2)),
    "exit": lambda: raising(SystemExit(3)),
    "deep": lambda: raising(RecursionError("too deep\\nindeed")),
    "numpy": lambda: np.float32(0.25),
    "long": lambda: [0.25] * 20_000,
}
calls = 0


def odd(model, tokenizer, request):
    global calls
    calls += request.split == "search"
    place = calls - 5 - 1  # after the baselines
    if request.split == "search" and 0 <= place < len(THINGS):
        return list(THINGS.values())[place]()
    return 0.5
'''


def make_fault_world(folder: Path) -> Path:
    """Make the end-to-end tests' world with a fitness of its own, which works for layer paths too."""
    make_world(folder)
    (folder / "fitness.py").write_text(FITNESS)
    (folder / "steered.py").write_text(STEERED)
    (folder / "odd.py").write_text(ODD)
    return folder


SPACES: dict[str, dict[str, Any]] = {
    "parameter": {"method": "task_arithmetic", "granularity": {"anchors": 2}},
    "mixed": {
        "method": "linear",
        "parameters": {"weight": "free", "normalize": "free"},
        "granularity": {"anchors": 2},
    },
    "data_flow": {"kind": "data_flow", "repeats": 1, "max_layers": 5},
    "layer_edits": {"kind": "layer_edits", "edits": 2, "operations": ["skip", "repeat", "borrow"]},
    "joint": {
        "kind": "joint",
        "parameter": {"method": "task_arithmetic"},
        "path": {"kind": "layer_edits", "edits": 1, "operations": ["skip", "repeat"]},
    },
    "segments": {"kind": "segments", "cells": 64, "chromosomes": [["attention"]]},
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "cma_es": {"name": "cma_es", "population": 4},
    "cma_es-plain": {"name": "cma_es", "population": 4, "lr_adapt": False},
    "cma_es-separable": {"name": "cma_es", "population": 4, "separable_above": 0},
    "cma_es-restarts": {"name": "cma_es", "population": 3, "restart_after": 1},
    "random": {"name": "random"},
    "tpe": {"name": "optuna", "sampler": "tpe", "startup": 4},
    "gp": {"name": "optuna", "sampler": "gp", "startup": 4},
    "optuna-cmaes": {"name": "optuna", "sampler": "cmaes", "population": 4},
    "nsga2": {"name": "optuna", "sampler": "nsga2", "population": 4},
    "qmc": {"name": "optuna", "sampler": "qmc"},
    "niches": {"name": "niches", "size": 4},
    "map_elites": {"name": "niches", "archive": "map_elites", "warm_up": 4},
}

GENERATIONAL = tuple(name for name in OPTIMIZERS if name.startswith("cma_es"))

CATEGORICAL = ("mixed", "layer_edits", "joint")

PAIRS = tuple(
    (optimizer, space)
    for optimizer, settings in OPTIMIZERS.items()
    for space in SPACES
    if (space != "segments" or settings["name"] == "niches")
    and (space not in CATEGORICAL or optimizer != "optuna-cmaes")
)
"""Every pair that a config may have."""

COVERING = (
    ("cma_es", "parameter"),
    ("cma_es-plain", "mixed"),
    ("cma_es-separable", "parameter"),
    ("cma_es-restarts", "joint"),
    ("random", "data_flow"),
    ("tpe", "layer_edits"),
    ("gp", "parameter"),
    ("optuna-cmaes", "parameter"),
    ("nsga2", "joint"),
    ("qmc", "data_flow"),
    ("niches", "segments"),
    ("map_elites", "segments"),
    ("niches", "layer_edits"),
)
"""Every optimizer and every space at least once."""


def write_pair(folder: Path, optimizer: str, space: str, evaluations: int = 9) -> str:
    """Write the config of a pair, `OPTIMIZER-SPACE.yaml`; return the run's name."""
    name = f"{optimizer}-{space}"
    niches = OPTIMIZERS[optimizer]["name"] == "niches"
    deltas = space in ("parameter", "joint")
    write_config(
        folder,
        f"{name}.yaml",
        name=name,
        sources={"base": "./base", "models": ["./one", "./two"]}
        if deltas
        else {"models": ["./one", "./two"]},
        space=SPACES[space],
        optimizer=OPTIMIZERS[optimizer],
        fitness={"function": f"fitness.py:{'solved' if niches else 'score'}"},
        budget={"evaluations": evaluations, "finalists": 2},
        baselines={"task_arithmetic": [0.3]},
    )
    return name
