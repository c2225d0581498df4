"""Rows of embedding and head that mergekit 0.1.5 merges over different vocabularies, recorded by token.

`HF_HUB_OFFLINE=1 python -m tests.checkpoints.mergekit_vocabulary PATH_OF_MERGEKIT_YAML` runs every merge in
`CASES` anew and writes `data/mergekit_vocabulary.npz`, which `read` reads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.tokenizer import vocabulary
from tests.checkpoints.tiny import make_llama, make_tokenizer

RECORDED = Path(__file__).parent / "data" / "mergekit_vocabulary.npz"
TENSORS = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
PADDING = "(padding)"
"""Stands for the rows that no token has."""

TOKENS = {
    "base": (),
    "a": ("<both>", "<|im_start|>", "<a>"),
    "b": ("<|im_start|>", "<both>", "<b>", "<x>"),
}
"""The last tokens of each source's vocabulary of 24 ids."""

WEIGHTED = {
    "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}]
}
CASES: dict[str, dict[str, Any]] = {
    "union": {"merge_method": "linear", **WEIGHTED, "tokenizer": {"source": "union"}},
    "three": {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("base", 0.2), ("a", 0.3), ("b", 0.5))
        ],
        "tokenizer": {"source": "union"},
    },
    "base": {
        "merge_method": "task_arithmetic",
        **WEIGHTED,
        "base_model": "base",
        "tokenizer": {"source": "base"},
        "parameters": {"normalize": False},
    },
    "named": {"merge_method": "linear", **WEIGHTED, "tokenizer": {"source": "b"}},
    "tokens": {
        "merge_method": "task_arithmetic",
        **WEIGHTED,
        "base_model": "base",
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<both>": {"source": "a", "force": True},
                "<a>": {"source": {"kind": "zero"}},
                "<b>": {"source": {"kind": "model_token", "model": "base", "token": "a"}},
                "</s>": {"source": {"kind": "model_token", "model": "b", "token_id": 5}, "force": True},
                "<new>": {"source": {"kind": "model_token", "model": "a", "token": "<|im_start|>"}},
            },
            "pad_to_multiple_of": 16,
        },
        "parameters": {"normalize": False},
    },
}
"""mergekit configs, with sources by name instead of path."""


def make_sources(folder: Path) -> dict[str, Path]:
    """Make the three sources, with rows that depend on nothing but this function."""
    made = {}
    for number, (name, extra) in enumerate(TOKENS.items()):
        made[name] = make_llama(folder / name, number, layers=1, hidden=8, vocab=24 + 2 * number)
        make_tokenizer(made[name], 24, extra)  # the last two sources have rows that pad
        file = made[name] / "model.safetensors"
        tensors = load_file(file)
        for shift, tensor in enumerate(TENSORS.values()):
            shape = tensors[tensor].shape
            phases = np.arange(np.prod(shape)).reshape(shape) * (1.7 + number) + shift
            tensors[tensor] = torch.from_numpy(np.sin(phases).astype(np.float32))
        save_file(tensors, file, {"format": "pt"})
    return made


def located(config: Any, folder: Path, key: str = "") -> Any:
    """Return a config with paths in place of names; the tokenizer's source `base` is a word of mergekit's."""
    if isinstance(config, dict):
        return {k: located(v, folder, k) for k, v in config.items()}
    if isinstance(config, list):
        return [located(item, folder) for item in config]
    named = key in ("model", "base_model") or (key == "source" and config != "base")
    return str(folder / config) if named and config in TOKENS else config


def rows_by_token(folder: Path) -> dict[str, np.ndarray]:
    """Return `TENSOR/TOKEN` to row, for every token of a merged model and its padding."""
    tokens = vocabulary(folder)
    assert tokens is not None
    stored = load_file(folder / "model.safetensors")
    found = {}
    for kind, name in TENSORS.items():
        tensor = stored[name].numpy()
        found |= {f"{kind}/{token}": tensor[number] for token, number in tokens.items()}
        if len(tensor) > len(tokens):
            assert np.ptp(tensor[len(tokens) :], axis=0).max() == 0
            found[f"{kind}/{PADDING}"] = tensor[-1]
    return found


def read(case: str) -> dict[str, np.ndarray]:
    """Return what `rows_by_token` found in mergekit's model."""
    with np.load(RECORDED) as stored:
        return dict(zip(stored[f"{case}:names"].tolist(), stored[f"{case}:rows"], strict=True))


def record(mergekit: str) -> None:
    """Run every case through mergekit and keep the rows."""
    arrays = {}
    with tempfile.TemporaryDirectory() as work:
        make_sources(Path(work))
        for case, config in CASES.items():
            Path(work, "config.yaml").write_text(yaml.safe_dump(located(config, Path(work))))
            subprocess.run(
                [mergekit, "config.yaml", f"merged-{case}"],
                cwd=work,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
            found = rows_by_token(Path(work, f"merged-{case}"))
            arrays[f"{case}:names"] = np.array(sorted(found))
            arrays[f"{case}:rows"] = np.stack([found[name] for name in sorted(found)])
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, **arrays)


if __name__ == "__main__":
    record(sys.argv[1])
