"""Reading and writing mergekit's YAML where the two have the same concept. No torch.

Merge configs become recipes and back; `mergekit-evolve` configs become run configs. What has no
counterpart here is refused by name, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from evomerge.catalogue import CATALOGUE, method_named
from evomerge.errors import ConfigError, RecipeError, UserError, nearest
from evomerge.recipe import (
    Recipe,
    RecipeSource,
    Rule,
    Scalar,
    Setting,
    parse_recipe,
    read_recipe,
    value_at,
)
from evomerge.records import Place, Role
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


class FilterSource(Protocol):
    """What writing needs to know of the sources' layout."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def places(self) -> Mapping[str, Place]:
        """The place of every tensor."""

    def filters(self, role: Role) -> tuple[str, ...]:
        """Return the parts of tensor names that make a role."""


def read_any_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file of either evomerge or mergekit."""
    data = read_yaml(path, RecipeError)
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
    base_key = _model_key(data["base_model"], f"{where}: base_model") if data.get("base_model") else None
    needs_base = method_named(method).needs_base
    models: list[tuple[tuple[str, str | None], dict[str, Any]]] = []
    for i, entry in enumerate(entries):
        key = _model_key(entry.get("model"), f"{where}: models.{i}")
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
        names[key] = _unique(Path(key[0]).name, {source["name"] for source in sources})
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
        base_name = _unique(Path(base_key[0]).name, set(names.values()))
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
    path, revision = _model_key(entry.get("model"), where)
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
    config = _model_config(path, revision)
    config = config.get("text_config") or config
    return next((config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)), None)


def _model_config(path: str, revision: str | None) -> dict[str, Any]:
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


def _model_key(model: Any, where: str) -> tuple[str, str | None]:
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
    key = _model_key(wanted, f"{where}: tokenizer_source")
    if key not in names:
        raise RecipeError(f"{where}: tokenizer_source: {wanted} is none of the models")
    return names[key]


def _unique(name: str, taken: set[str]) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:90] or "model"
    number, result = 2, cleaned
    while result in taken:
        result, number = f"{cleaned}-{number}", number + 1
    return result


def to_mergekit(recipe: Recipe, layout: FilterSource) -> dict[str, Any]:
    """Return a recipe as a mergekit config that `mergekit-yaml` runs.

    Random masks differ between the two, so for methods that draw any the result is another sample of the
    same distribution.

    Raises:
        RecipeError: mergekit cannot express it.
    """
    method = method_named(recipe.method)
    if not method.mergekit:
        raise RecipeError(f"mergekit has no method {recipe.method}")
    expectation = _rescales_by_expectation(recipe)
    models = []
    for source in recipe.sources:
        settings = {name: _setting_written(rules, layout) for name, rules in source.parameters.items()}
        if expectation:
            settings["weight"] = _weight_written(source, layout)
        models.append({"model": _written(source.path, source.revision), "parameters": settings})
    shared = {name: _setting_written(rules, layout) for name, rules in recipe.parameters.items()}
    if "rescale" in shared:
        shared["rescale"] = shared["rescale"] == "l1"
    config: dict[str, Any] = {"merge_method": recipe.method, "models": models}
    if recipe.base:
        config["base_model"] = _written(recipe.base.path, recipe.base.revision)
    elif recipe.method == "slerp":
        config["base_model"] = models[0]["model"]
        for model in models:
            del model["parameters"]
    config["parameters"] = shared
    known = _model_config(recipe.reference.path, recipe.reference.revision)
    dtype = recipe.dtype or known.get("dtype") or known.get("torch_dtype")
    if dtype:
        # mergekit works in `dtype`; float32 there and the recipe's dtype for the output is what is done here.
        config["dtype"] = "float32"
        config["out_dtype"] = dtype
    if recipe.tokenizer and recipe.tokenizer != recipe.reference.name:
        ref = next(ref for ref in recipe.refs if ref.name == recipe.tokenizer)
        config["tokenizer_source"] = _written(ref.path, ref.revision)
    return config


def _written(path: str, revision: str | None) -> Any:
    return {"model": {"path": path, "revision": revision}} if revision else path


def _setting_written(setting: Setting, layout: FilterSource) -> Any:
    """Return a setting in mergekit's form."""
    return _corrected(
        _rules_written(setting, layout),
        {place: value_at(setting, place) for place in layout.places.values()},
        layout,
    )


def _weight_written(source: RecipeSource, layout: FilterSource) -> Any:
    """Return the weights with the rescaling by 1/density in them, which mergekit lacks."""

    def divided(weight: Scalar, density: Scalar) -> float:
        return float(weight) / float(density) if density else 0.0

    weight, density = source.parameters["weight"], source.parameters["density"]
    depths = [i / max(layout.num_layers - 1, 1) for i in range(layout.num_layers)]
    rules = []
    for rule in weight:
        other = next((d for d in density if (d.role, d.match) == (rule.role, rule.match)), density[-1])
        values = tuple(divided(rule.at(depth), other.at(depth)) for depth in depths)
        rules.append(Rule(role=rule.role, match=rule.match, value=values))
    wanted: dict[Place, Scalar] = {
        place: divided(value_at(weight, place), value_at(density, place)) for place in layout.places.values()
    }
    return _corrected(_rules_written(tuple(rules), layout), wanted, layout)


def _rescales_by_expectation(recipe: Recipe) -> bool:
    rescale = recipe.parameters.get("rescale")
    if rescale is None or rescale[0].value != "expectation":
        return False
    if any(rule.value is not False for rule in recipe.parameters["normalize"]):
        raise RecipeError("mergekit cannot rescale by 1/density and normalise the weights at once")
    return True


def _rules_written(setting: Setting, layout: FilterSource) -> list[dict[str, Any]]:
    """Return the rules as filters as far as filters have the same concept."""
    written: list[dict[str, Any]] = []
    for rule in setting:
        value = _plain_value(rule.value)
        if rule.general:
            written.append({"value": value})
        elif rule.role is None:
            written.append({"filter": rule.match, "value": value})
        elif rule.match is None:
            parts = layout.filters(rule.role)
            written += [{"filter": part, "value": _plain_value(rule.value)} for part in parts]
    return written


def _corrected(written: list[dict[str, Any]], wanted: Mapping[Place, Scalar], layout: FilterSource) -> Any:
    """Return filters that give every tensor what is wanted, with filters of their own for exceptions.

    Head and final norm lie at depth 1 here and at the gradient's beginning in mergekit, roles can overlap
    in their parts of names, and a rule may ask for role and name at once.
    """
    several = layout.num_layers > 1

    def wrong(filters: list[dict[str, Any]]) -> list[Place]:
        return [place for place in wanted if not _near(_read_there(filters, place, several), wanted[place])]

    exceptions = [{"filter": place.name, "value": wanted[place]} for place in wrong(written)]
    filters = [*exceptions, *written]
    left = wrong(filters)
    if left:
        raise RecipeError(f"mergekit's filters cannot tell tensor {left[0].name} from others")
    return filters[0]["value"] if len(filters) == 1 else filters


def _near(one: Scalar | None, other: Scalar) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * max(1.0, abs(other))
    return one == other


def _read_there(filters: list[dict[str, Any]], place: Place, several: bool) -> Scalar | None:
    """Return what mergekit makes of filters for one tensor."""
    depth = 0.0 if place.layer is None else place.depth if several else 1.0
    for item in filters:
        if item.get("filter", "") in place.name:
            value = item["value"]
            return Rule(value=tuple(value)).at(depth) if isinstance(value, list) else value
    return None


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_evolve_config(data: Mapping[str, Any]) -> bool:
    """Whether plain data is a config of mergekit-evolve."""
    return "genome" in data and "tasks" in data


def read_evolve_config(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a mergekit-evolve config as the data of a run config.

    Its `limit` becomes the number of search documents, with as many select documents beside them and the rest
    for the test; documents are always shuffled. Weights are drawn from [0, 1], or from [-1, 1] where negative
    ones are allowed, and the search starts in the middle with step size 1/6.

    Raises:
        ConfigError: It uses something that has no counterpart here.
    """
    genome = data["genome"]
    where = str(path)
    known_top = {
        "genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template",
        "fewshot_as_multiturn",
    }  # fmt: skip
    known_genome = {
        "models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
        "allow_negative_weights", "filters", "smooth",
    }  # fmt: skip
    for part, known, prefix in ((data, known_top, ""), (genome, known_genome, "genome.")):
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: {prefix.rstrip('.')}: expected a mapping")
        for key in part:
            if key not in known:
                raise ConfigError(f"{where}: {prefix}{key}: unknown key{nearest(str(key), known)}")
    for part, key, prefix in ((data, "random_init", ""), (genome, "smooth", "genome.")):
        if part.get(key):
            raise ConfigError(f"{where}: {prefix}{key}: not supported; leave it out")
    for part, key, prefix in ((data, "tasks", ""), (genome, "models", "genome.")):
        if not isinstance(part.get(key), list) or not part[key]:
            raise ConfigError(f"{where}: {prefix}{key}: expected a list, got {part.get(key)!r}")
    method = str(genome.get("merge_method"))
    if method not in ("linear", "slerp", "task_arithmetic", "ties", "dare_ties"):
        raise ConfigError(f'{where}: genome.merge_method: mergekit-evolve has no method "{method}"')
    try:
        keys = [_model_key(m, f"{where}: genome.models.{i}") for i, m in enumerate(genome["models"])]
        base = (
            _model_key(genome["base_model"], f"{where}: genome.base_model")
            if genome.get("base_model")
            else None
        )
        tokenizer = genome.get("tokenizer_source")
        token_key = (
            None
            if tokenizer in (None, "base", "union")
            else _model_key(tokenizer, f"{where}: genome.tokenizer_source")
        )
    except UserError as problem:
        raise ConfigError(str(problem)) from None
    if method == "slerp" and len(keys) != 2:
        raise ConfigError(f"{where}: genome.models: slerp takes 2 models here, got {len(keys)}")
    names: dict[tuple[str, str | None], str] = {}
    for key in [*([base] if base else []), *keys]:
        names.setdefault(key, _unique(Path(key[0]).name, set(names.values())))
    refs = {key: {"name": name, "path": key[0], "revision": key[1]} for key, name in names.items()}
    step = genome.get("layer_granularity") or 0
    granularity: Any = {"layers": step} if not isinstance(step, int) or step > 0 else "model"
    negative = bool(genome.get("allow_negative_weights"))
    parameters: dict[str, Any] = (
        {"t": {}} if method == "slerp" else {"weight": {"low": -1.0 if negative else 0.0, "high": 1.0}}
    )
    if method in ("ties", "dare_ties"):
        parameters["density"] = {"low": 0.0 if method == "ties" else 0.01, "high": 1.0}
    if method != "slerp":
        normalize = genome.get("normalize")
        parameters["normalize"] = (
            method in ("ties", "dare_ties", "linear") if normalize is None else normalize
        )
    if method == "dare_ties":
        parameters["rescale"] = "l1"
    space = {
        "method": method,
        "granularity": granularity,
        "split": genome.get("filters") or [],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    if token_key is not None:
        if token_key not in names:
            raise ConfigError(f"{where}: genome.tokenizer_source: {token_key[0]} is none of the models")
        space["tokenizer"] = names[token_key]
    limit = data.get("limit")
    tasks = []
    for i, given in enumerate(data["tasks"]):
        if not isinstance(given, str | Mapping):
            raise ConfigError(f"{where}: tasks.{i}: expected a name or a mapping, got {given!r}")
        task = {"name": given} if isinstance(given, str) else dict(given)
        tasks.append(task)
        task.setdefault("metric", "acc,none")
        if data.get("num_fewshot") is not None:
            task["num_fewshot"] = data["num_fewshot"]
    fitness: dict[str, Any] = {
        "tasks": tasks,
        "chat_template": data.get("apply_chat_template", True),
        "fewshot_as_multiturn": data.get("fewshot_as_multiturn", True),
    }
    if limit:
        fitness["documents"] = {"search": limit, "select": limit, "test": "rest"}
    models = [refs[key] for key in keys if key != base or method in ("linear", "slerp")]
    sources: dict[str, Any] = {"models": models}
    if base and base not in [key for key in keys if method in ("linear", "slerp")]:
        sources["base"] = refs[base]
    return {
        "sources": sources,
        "space": space,
        "optimizer": {"name": "cma_es", "lr_adapt": False},
        "fitness": fitness,
        "budget": {"evaluations": 100},
    }
