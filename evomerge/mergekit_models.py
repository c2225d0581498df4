"""Models as mergekit's configs name them. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError

Key = tuple[str, str | None]
"""A path or hub id, and a revision."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys of a model config that say how many layers it has."""


def layer_count(path: str, revision: str | None) -> int | None:
    """Return the number of layers of a checkpoint that is on this machine; None if it is not."""
    config = model_config(path, revision)
    config = config.get("text_config") or config
    return next((config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)), None)


def model_config(path: str, revision: str | None) -> dict[str, Any]:
    """Return the config of a local or downloaded checkpoint; empty if it is neither, or broken."""
    file: Path | str | None = Path(path) / "config.json"
    if not Path(path).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        except HFValidationError:
            return {}
        file = cached if isinstance(cached, str) else None
    try:
        config = json.loads(Path(file).read_bytes()) if file else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def model_key(model: Any, where: str) -> Key:
    """Return (path or hub id, revision)."""
    revision = None
    if isinstance(model, dict):
        for key in model:
            if key not in ("model", "lora"):
                raise RecipeError(f"{where}: {key}: not supported")
        lora, model = model.get("lora"), model.get("model")
        if lora is not None:
            parts = [_with_revision(part, where) for part in (model, lora)]
            return "+".join(parts), None
        if isinstance(model, dict):
            model, revision = model.get("path"), model.get("revision")
    if not isinstance(model, str) or not model:
        raise RecipeError(f"{where}: expected a path or hub id, got {model!r}")
    # Of a base with an adapter on it, BASE+ADAPTER, each part has a revision of its own.
    if "@" in model and "+" not in model and not Path(model).exists():
        model, _, revision = model.partition("@")
    return model, revision


def _with_revision(model: Any, where: str) -> str:
    path, revision = model_key(model if isinstance(model, str) else {"model": model}, where)
    return f"{path}@{revision}" if revision else path


def unique(name: str, taken: set[str]) -> str:
    """Return `name` made fit to be a source's name, with a number behind it if it is taken."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:90] or "model"
    number, result = 2, cleaned
    while result in taken:
        result, number = f"{cleaned}-{number}", number + 1
    return result
