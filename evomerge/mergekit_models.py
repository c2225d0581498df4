"""Models as mergekit's configs name them. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError
from evomerge.reading import is_folder, parse_json, read_bytes

_MAX_CONFIG = 16 * 2**20

Key = tuple[str, str | None]
"""A path or hub id, and a revision."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys of a model config that say how many layers it has."""


def layer_count(path: str, revision: str | None) -> int | None:
    """Return the number of layers of a checkpoint that is on this machine; None if it is not."""
    config = model_config(path, revision)
    nested = config.get("text_config")
    config = nested if isinstance(nested, dict) else config
    return next((config[key] for key in LAYER_COUNTS if type(config.get(key)) is int), None)


def model_config(path: str, revision: str | None) -> dict[str, Any]:
    """Return the config of a local or downloaded checkpoint; empty if it is neither, or broken."""
    file: Path | str | None = Path(path) / "config.json"
    if not is_folder(Path(path)):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        except HFValidationError:
            return {}
        file = cached if isinstance(cached, str) else None
    try:
        return parse_json(read_bytes(Path(file), _MAX_CONFIG, RecipeError), path, RecipeError) if file else {}
    except RecipeError:  # opening the checkpoint will say what is wrong
        return {}


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
