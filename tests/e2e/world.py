"""A small world for end-to-end tests: three tiny checkpoints, tasks or a callable, a config."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from evomerge.store import RunView, Store
from tests.checkpoints.tiny import make_llama
from tests.nursery import Done, Nursery

FUNCTION = '''
"""Fitness without any task: how near a few weights are to a target, one value per document."""

import os
import time

import torch


def score(model, tokenizer, request):
    time.sleep(float(os.environ.get("FITNESS_SECONDS", "0")))
    weights = model.model.layers[1].mlp.down_proj.weight.flatten()
    offset = {"search": 0, "select": 100, "test": 200}[request.split]
    random = torch.Generator().manual_seed(7)
    target = torch.randn(len(weights), generator=random) * 0.02
    values = -((weights - target)[offset : offset + 40] ** 2) * 1e4
    log = os.environ.get("FITNESS_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{request.recipe.digest} {request.split}\\n")
    return {"near": values.tolist()}


def solved(model, tokenizer, request):
    return {"near": [float(value > -3.0) for value in score(model, tokenizer, request)["near"]]}


def broken(model, tokenizer, request):
    raise RuntimeError("the benchmark is down")


def sometimes_nan(model, tokenizer, request):
    value = float(model.model.layers[0].mlp.down_proj.weight.sum())
    return float("nan") if int(abs(value) * 1e4) % 3 == 0 else {"v": [value, value + 0.1]}


def hang_once(model, tokenizer, request):
    marker = os.environ["HANG_MARKER"]
    if request.recipe.method == "task_arithmetic" and not os.path.exists(marker):
        open(marker, "w").close()
        time.sleep(3600)
    return score(model, tokenizer, request)


def deadly(model, tokenizer, request):
    if request.recipe.parameters.get("lambda") and request.recipe.parameters["lambda"][0].value == 0.6:
        os.kill(os.getpid(), 9)
    return score(model, tokenizer, request)
'''


def make_world(folder: Path) -> Path:
    """Write checkpoints, tasks, fitness.py and config.yaml (callable, inline pool); return the folder."""
    for seed, name in enumerate(("base", "one", "two")):
        make_llama(folder / name, seed=seed, layers=3, vocab=96)
    (folder / "fitness.py").write_text(FUNCTION)
    tasks = folder / "tasks"
    tasks.mkdir()
    chance = random.Random(0)

    def word() -> str:
        return "".join(chance.choice("abcdef") for _ in range(6))

    choice = [{"q": word(), "choices": ["a", "b", "c"], "gold": chance.randrange(3)} for _ in range(90)]
    written = [{"q": word() + "=", "a": chance.choice("abc")} for _ in range(90)]
    for name, rows in (("choice", choice), ("written", written)):
        (tasks / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}"}
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, kind in kinds.items():
        data = {"data_files": {"test": str((tasks / f"{name}.json").resolve())}}
        text = yaml.safe_dump({"task": name, "dataset_kwargs": data, **common, **kind})
        (tasks / f"{name}.yaml").write_text(text)
    write_config(folder)
    return folder


def write_config(folder: Path, file: str = "config.yaml", **changes: Any) -> Path:
    """Write a config of the world with some sections replaced."""
    config: dict[str, Any] = {
        "name": "small",
        "sources": {"base": "./base", "models": ["./one", "./two"]},
        "space": {"method": "task_arithmetic", "granularity": {"anchors": 2}},
        "optimizer": {"name": "cma_es", "population": 4},
        "fitness": {"function": "fitness.py:score"},
        "budget": {"evaluations": 12, "finalists": 3},
        "baselines": {"task_arithmetic": [0.3, 0.6]},
        "workers": {"pool": "inline", "threads": 1},
        "output": {"report": False},
    }
    config.update(changes)
    path = folder / file
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


TASKS = {
    "include_paths": ["tasks"],
    "tasks": ["choice", "written"],
    "documents": {"search": 30, "select": 30, "test": 30},
}
"""A fitness section with the world's two tasks."""


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of `evomerge` in this interpreter."""
    return [sys.executable, "-m", "evomerge", *map(str, arguments)]


def evomerge(
    folder: Path, *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 300
) -> Done:
    """Run `evomerge` in a folder and wait for it; forked from a process that has everything loaded."""
    return Nursery(folder).run(*arguments, env=env, timeout=timeout)


def evomerge_anew(
    folder: Path, *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `evomerge` in a folder and wait for it, in an interpreter of its own: as users do, and slowly."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Started:
    """A command that runs, forked as by `evomerge`; it leads a session and a group of processes.

    Attributes:
        pid: Its process.
        returncode: How it ended; None as long as nobody has seen that it did.
    """

    def __init__(self, folder: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        self._nursery = Nursery(folder)
        self._done: Done | None = None
        self.pid = self._nursery.start(*arguments, env=env)

    @property
    def returncode(self) -> int | None:
        return None if self._done is None else self._done.returncode

    def poll(self) -> int | None:
        """Return how it ended; None while it runs."""
        self._done = self._done or self._nursery.ended(self.pid)
        return self.returncode

    def said(self) -> str:
        """Return what it has written on its standard error by now."""
        return self._nursery.printed(self.pid)[1] if self._done is None else self._done.stderr

    def kill(self) -> None:
        """End it and all its group by SIGKILL, and wait for that."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.end()

    def end(self, timeout: float = 120.0) -> Done:
        """Wait for its end."""
        self._done = self._done or self._nursery.wait(self.pid, timeout)
        return self._done


def start(folder: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> Started:
    """Start `evomerge` in a folder; forked from a process that has everything loaded."""
    return Started(folder, *arguments, env=env)


def start_anew(
    folder: Path, *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `evomerge` in a folder, in an interpreter and a session of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcomes_in(store: str | Path, name: str) -> int:
    """Return how many outcomes a run has; 0 while it does not exist."""
    try:
        with Store.open(store, create=False) as opened:
            return len(opened.run(name).outcomes(values=False))
    except Exception:
        return 0


def wait_for_outcomes(
    process: Started | subprocess.Popen[str], store: str | Path, name: str, count: int
) -> bool:
    """Wait until a run has so many outcomes; return False if the process ended before."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        there = outcomes_in(store, name)
        if there >= count:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.02 if there else 0.2)  # a look is not cheap, and a start takes seconds
    raise TimeoutError(f"run {name} did not get {count} outcomes")


def history(store: str | Path, name: str) -> dict[str, Any]:
    """Return everything of a run that must be equal bit for bit however it was interrupted."""
    with Store.open(store, create=False) as opened:
        view: RunView = opened.run(name)
        outcomes = []
        for outcome in view.outcomes():
            data = outcome.to_json()
            del data["cost"]
            outcomes.append(data)
        return {
            "candidates": [
                (
                    c.number,
                    c.origin,
                    c.generation,
                    c.index,
                    c.genome and tuple(map(float.hex, c.genome)),
                    c.digest,
                )
                for c in view.candidates()
            ],
            "outcomes": outcomes,
            "status": view.status,
        }
