"""Reading mergekit's merge configs as recipes. No torch.

What has no counterpart here is refused by name, never dropped. `mergekit_writer` goes the other way,
`mergekit_evolve` reads the configs of mergekit-evolve.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.catalogue import CATALOGUE, method_named
from evomerge.errors import RecipeError, nearest
from evomerge.recipe import (
    Recipe,
    parse_recipe,
    read_recipe,
)
from evomerge.strict import read_yaml

IGNORED = frozenset({"int8_mask"})
"""Parameters that change how mergekit computes, not what."""

KNOWN = frozenset(
    {
        "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "name", "chat_template",
    }
)  # fmt: skip


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys of a model config that say how many layers it has."""

FINAL_NORMS = ("model.norm.", "final_layer_norm.", "final_layernorm.", "ln_f.")
"""Parts of the names of norms behind the last layer."""


def read_any_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file of either evomerge or mergekit."""
    data = read_yaml(path, RecipeError)
    if isinstance(data, dict) and {"genome", "space"} & set(data):
        raise RecipeError(f"{path}: this is a run config, not a recipe; use `evomerge run {path}`")
    if isinstance(data, dict) and "merge_method" in data:
        return from_mergekit(data, str(path))
    return read_recipe(path)


def from_mergekit(data: Mapping[str, Any], where: str) -> Recipe:
    """Return a mergekit merge config as a recipe.

    Raises:
        RecipeError: It uses something that has no counterpart here.
    """
    for unknown in [key for key in data if key not in KNOWN]:
        raise RecipeError(f'{where}: unknown key "{unknown}"{nearest(str(unknown), KNOWN)}')
    method = str(data["merge_method"])
    if method not in CATALOGUE:
        raise RecipeError(f'{where}: merge_method: "{method}" is not supported{nearest(method, CATALOGUE)}')
    if data.get("chat_template") is not None:
        raise RecipeError(f"{where}: chat_template: not supported; the tokenizer's own template is kept")
    entries, sliced = _entries(data, where)
    base_key = model_key(data["base_model"], f"{where}: base_model") if data.get("base_model") else None
    needs_base = method_named(method).needs_base
    models: list[tuple[tuple[str, str | None], dict[str, Any]]] = []
    for i, entry in enumerate(entries):
        key = model_key(entry.get("model"), f"{where}: models.{i}")
        own = _parameters(entry.get("parameters") or {}, method, f"{where}: models.{i}.parameters")
        if needs_base and key == base_key:
            if own:
                raise RecipeError(f"{where}: models.{i}: the base takes no parameters")
        else:
            models.append((key, own))
    shared = _parameters(data.get("parameters") or {}, method, f"{where}: parameters")
    for name, rules in sliced.items():
        shared[name] = _followed(rules, shared.get(name))
    if method.startswith("dare"):
        shared.setdefault("rescale", [{"value": "l1"}])
    if not needs_base and base_key is not None and base_key not in [key for key, _ in models]:
        # mergekit merges a base that is not listed like any other model.
        if method != "slerp" and "weight" not in shared:
            raise RecipeError(f"{where}: base_model: {base_key[0]} takes part in the merge; give its weight")
        models.append((base_key, {}))
    if method == "slerp":
        # The base is where t is 0, whatever the order of the models.
        models.sort(key=lambda model: model[0] != base_key)
    method_wide = {p.name for p in method_named(method).parameters if p.scope == "method"}
    inherited = {name: rules for name, rules in shared.items() if name not in method_wide}
    names: dict[tuple[str, str | None], str] = {}
    sources: list[dict[str, Any]] = []
    for key, own in models:
        names[key] = unique(Path(key[0]).name, {source["name"] for source in sources})
        settings = {name: _followed(own.get(name), inherited.get(name)) for name in {**inherited, **own}}
        sources.append({"name": names[key], "path": key[0], "revision": key[1], "parameters": settings})
    recipe: dict[str, Any] = {
        "method": method,
        "sources": sources,
        "parameters": {name: rules for name, rules in shared.items() if name in method_wide},
        "dtype": data.get("out_dtype") or data.get("dtype"),
    }
    if needs_base:
        if base_key is None:
            raise RecipeError(f"{where}: base_model: missing; method {method} works on deltas from a base")
        base_name = unique(Path(base_key[0]).name, set(names.values()))
        names[base_key] = base_name
        recipe["base"] = {"name": base_name, "path": base_key[0], "revision": base_key[1]}
    recipe["tokenizer"] = _tokenizer(data, names, base_key, where)
    return parse_recipe({k: v for k, v in recipe.items() if v is not None}, where)


def _followed(first: list[dict[str, Any]] | None, then: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the rules that count first and behind them those that count for what they leave out."""
    return [*(first or []), *(then or [])]


def _entries(
    data: Mapping[str, Any], where: str
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the models of a config and the parameters of its slice.

    Slices are read only where a single one covers all layers of every model.
    """
    if (data.get("models") is None) == (data.get("slices") is None):
        raise RecipeError(f"{where}: expected either models or slices")
    entries, known, sliced = data.get("models"), ["model", "parameters"], {}
    if entries is None:
        slices = data["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            got = len(slices) if isinstance(slices, list) else 0
            raise RecipeError(f"{where}: slices: only a single slice over all layers is supported, got {got}")
        for key in slices[0]:
            if key not in ("sources", "parameters"):
                raise RecipeError(
                    f'{where}: slices.0: unknown key "{key}"{nearest(str(key), ["sources", "parameters"])}'
                )
        entries, known = slices[0].get("sources"), [*known, "layer_range"]
        given = slices[0].get("parameters") or {}
        sliced = _parameters(given, str(data["merge_method"]), f"{where}: slices.0.parameters")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise RecipeError(f"{where}: models: expected a list of mappings with a model each")
    for i, entry in enumerate(entries):
        for key in entry:
            if key not in known:
                raise RecipeError(f'{where}: models.{i}: unknown key "{key}"{nearest(str(key), known)}')
        if "layer_range" in known:
            _check_range(entry, f"{where}: slices.0.sources.{i}")
    return entries, sliced


def _check_range(entry: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError unless a slice holds all layers of its model."""
    wanted = entry.get("layer_range")
    path, revision = model_key(entry.get("model"), where)
    count = _layer_count(path, revision)
    if count is None:
        raise RecipeError(
            f"{where}: layer_range: cannot tell whether {wanted} are all layers of {path}, which is not on "
            "this machine yet; download it, or write models instead of slices"
        )
    if wanted != [0, count]:
        raise RecipeError(
            f"{where}: layer_range: only all layers of a model are supported, "
            f"[0, {count}] for {path}, got {wanted}"
        )


def _layer_count(path: str, revision: str | None) -> int | None:
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


def model_key(model: Any, where: str) -> tuple[str, str | None]:
    """Return (path or hub id, revision)."""
    revision = None
    if isinstance(model, dict):
        inner = model.get("model")
        if isinstance(inner, dict):
            model, revision = inner.get("path"), inner.get("revision")
        if isinstance(model, dict) or model is None:
            raise RecipeError(f"{where}: expected a path or hub id")
    if not isinstance(model, str) or not model:
        raise RecipeError(f"{where}: expected a path or hub id, got {model!r}")
    if "+" in model and not Path(model).exists():
        raise RecipeError(f"{where}: {model}: adapters are not supported yet; merge the adapter first")
    if "@" in model and not Path(model).exists():
        model, _, revision = model.partition("@")
    return model, revision


def _parameters(data: Any, method: str, where: str) -> dict[str, list[dict[str, Any]]]:
    """Return mergekit's settings by name as rules of a recipe."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping")
    return {
        str(name): _setting_read(value, method, str(name), f"{where}.{name}")
        for name, value in data.items()
        if name not in IGNORED
    }


def _setting_read(value: Any, method: str, name: str, where: str) -> list[dict[str, Any]]:
    """Return a mergekit value (number, gradient, or list of filters) as rules of a recipe."""
    items = [value] if isinstance(value, dict) else value
    if not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
        items = [{"value": value}]
    rules = []
    for item in items:
        for key in item:
            if key not in ("filter", "value"):
                raise RecipeError(f'{where}: unknown key "{key}"{nearest(str(key), ["filter", "value"])}')
        part = None if item.get("filter") in (None, "*") else str(item["filter"])
        rules += _rules_read(_scalar_read(item.get("value"), method, name), part)
    return rules


def _rules_read(value: Any, part: str | None) -> list[dict[str, Any]]:
    """Return the rules of one filter.

    mergekit takes a gradient's first value for everything outside the layers, also for head and final norm,
    which lie behind the last layer here.
    """
    match = {} if part is None else {"match": part}
    rules: list[dict[str, Any]] = []
    if isinstance(value, list) and len(value) > 1:
        rules.append({"role": "head", **match, "value": value[0]})
        finals = [name for name in FINAL_NORMS if part is None or part in name + "weight"]
        rules += [{"role": "norm", "match": name, "value": value[0]} for name in finals]
    return [*rules, {**match, "value": value}]


def _scalar_read(value: Any, method: str, name: str) -> Any:
    """Return a value as this method's parameter takes it: mergekit writes switches also as 0 and 1."""
    known = {parameter.name: parameter for parameter in method_named(method).parameters}
    if name == "rescale" and name in known and isinstance(value, bool | int):
        return "l1" if value else "none"
    switch = name in known and known[name].choices == (True, False)
    return bool(value) if switch and isinstance(value, int | float) else value


def _tokenizer(
    data: Mapping[str, Any],
    names: Mapping[tuple[str, str | None], str],
    base_key: tuple[str, str | None] | None,
    where: str,
) -> str | None:
    wanted = data.get("tokenizer_source")
    if isinstance(data.get("tokenizer"), dict):
        unknown = set(data["tokenizer"]) - {"source"}
        if unknown:
            raise RecipeError(f"{where}: tokenizer.{unknown.pop()}: token surgery is not supported")
        wanted = data["tokenizer"].get("source", wanted)
    if wanted is None:
        return None
    if wanted == "union":
        # All sources have the same vocabulary, or they are refused, so their union is any one of them.
        return None
    if wanted == "base":
        return names.get(base_key) if base_key else None
    key = model_key(wanted, f"{where}: tokenizer_source")
    if key not in names:
        raise RecipeError(f"{where}: tokenizer_source: {wanted} is none of the models")
    return names[key]


def unique(name: str, taken: set[str]) -> str:
    """Return `name` made fit to be a source's name, with a number behind it if it is taken."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:90] or "model"
    number, result = 2, cleaned
    while result in taken:
        result, number = f"{cleaned}-{number}", number + 1
    return result
