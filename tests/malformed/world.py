"""One sound world with every kind of file that evomerge reads, and the commands that read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from evomerge.checkpoints.source import Checkpoint
from tests.checkpoints.tiny import make_llama, make_tokenizer
from tests.e2e.world import TASKS, make_world, write_config

COMMANDS: dict[str, tuple[str, ...]] = {
    "validate": ("validate", "config.yaml"),
    "merge": ("merge", "recipe.yaml", "out"),
    "mergekit": ("merge", "mergekit.yaml", "out"),
    "stack": ("merge", "stack.yaml", "out"),
    "evolve": ("validate", "evolve.yaml", "--set", "fitness.include_paths=[tasks]"),
    "adapters": ("merge-adapters", "adapters.yaml", "out"),
    "adapted": ("merge", "adapted.yaml", "out"),
    "union": ("merge", "union.yaml", "out"),
    "population": ("population", "import", "population.json", "niches.yaml", "out.json"),
    "tasks": ("validate", "tasks.yaml"),
    "inspect": ("inspect", "./one", "./two", "--base", "./base"),
}
"""Name to the arguments of a command that reads some of the files; in the sound world all end well."""


def make_sound(folder: Path) -> Path:
    """Write the sound world; return the folder."""
    make_world(folder)
    write_config(folder, "tasks.yaml", fitness={**TASKS, "function": None})
    _write_yaml(folder / "tasks.yaml", {**_read(folder / "tasks.yaml"), "fitness": TASKS})
    make_llama(folder / "wider", seed=3, layers=3, vocab=97)
    make_tokenizer(folder / "wider", 97, extra=("<new>",))
    sources = [{"name": "one", "path": "./one"}, {"name": "two", "path": "./two"}]
    recipe = {"evomerge": 1, "method": "ties", "base": {"name": "base", "path": "./base"}, "sources": sources}
    sources[0]["parameters"] = {
        "weight": [0.2, 0.7],
        "density": [{"role": "mlp", "value": 0.5}, {"value": 0.6}],
    }
    _write_yaml(folder / "recipe.yaml", recipe)
    models = [
        {"model": "one", "parameters": {"weight": 0.5, "density": 0.5}},
        {"model": "two", "parameters": {"weight": 0.4}},
    ]
    mergekit = {"merge_method": "ties", "base_model": "base", "models": models, "dtype": "float32"}
    _write_yaml(folder / "mergekit.yaml", mergekit)
    slices = [
        {"sources": [{"model": name, "layer_range": span}]}
        for name, span in (("one", [0, 2]), ("two", [1, 3]))
    ]
    _write_yaml(folder / "stack.yaml", {"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
    genome = {"models": ["one", "two"], "merge_method": "linear", "layer_granularity": 1, "filters": ["mlp"]}
    _write_yaml(
        folder / "evolve.yaml", {"genome": genome, "tasks": [{"name": "choice", "weight": 1.0}], "limit": 20}
    )
    _make_adapter(folder / "lora", folder / "base")
    _write_yaml(
        folder / "adapters.yaml",
        {"method": "sum", "adapters": [{"path": "./lora", "weight": 0.5}], "rank": 2},
    )
    adapted = [{"name": "tuned", "path": "./base+./lora"}, {"name": "one", "path": "./one"}]
    _write_yaml(folder / "adapted.yaml", {"method": "linear", "sources": adapted})
    union = [{"name": "one", "path": "./one"}, {"name": "wider", "path": "./wider"}]
    _write_yaml(
        folder / "union.yaml",
        {"method": "linear", "sources": union, "tokenizer": "union", "chat_template": "chatml"},
    )
    _make_population(folder)
    return folder


def _make_adapter(folder: Path, base: Path) -> None:
    import torch

    from evomerge.checkpoints.adapters import peft_config, write_adapter

    tensors, ranks = {}, {}
    info = Checkpoint.open(base).tensors
    random = torch.Generator().manual_seed(0)
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        module = f"model.layers.1.{part}"
        out, into = info[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, into, generator=random)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=random)
        ranks[module] = 2
    write_adapter(folder, peft_config(ranks, "../base", None), tensors)


def _make_population(folder: Path) -> None:
    write_config(folder, "niches.yaml", optimizer={"name": "niches"}, space={"method": "linear"})
    sources = [
        {"name": name, "path": f"./{name}", "fingerprint": Checkpoint.open(folder / name).fingerprint}
        for name in ("one", "two")
    ]
    labels = [("weight one", "real", 0), ("weight two", "real", 0)]
    members = [{"candidate": n, "score": 0.5, "parents": [], "genome": [0.25 * n, 0.5]} for n in range(3)]
    data = {"kind": "numbers", "run": "r", "sources": sources, "dimensions": labels, "individuals": members}
    (folder / "population.json").write_text(json.dumps({"evomerge": 1, **data}))


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


def _write_yaml(path: Path, data: Any) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
