"""Reading and writing mergekit's YAML where the two have the same concept. No torch.

Merge configs become recipes and back; `mergekit-evolve` configs become run configs. What has no
counterpart here is refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from evomerge.catalogue import CATALOGUE, method_named
from evomerge.errors import ConfigError, RecipeError, UserError, nearest
from evomerge.recipe import Recipe, Rule, Setting, parse_recipe, read_recipe
from evomerge.records import Role
from evomerge.strict import read_yaml

IGNORED = frozenset({"int8_mask"})
"""Parameters that change how mergekit computes, not what."""

KNOWN = frozenset(
    {
        "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "name", "chat_template",
    }
)  # fmt: skip


class FilterSource(Protocol):
    """What writing needs to know of the sources' layout."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

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
    for unknown in set(data) - KNOWN:
        raise RecipeError(f'{where}: unknown key "{unknown}"{nearest(str(unknown), KNOWN)}')
    method = str(data["merge_method"])
    if method not in CATALOGUE:
        raise RecipeError(f'{where}: merge_method: "{method}" is not supported{nearest(method, CATALOGUE)}')
    entries = _entries(data, where)
    base_key = _model_key(data["base_model"], where) if data.get("base_model") else None
    needs_base = method_named(method).needs_base
    sources: list[dict[str, Any]] = []
    names: dict[tuple[str, str | None], str] = {}
    for i, entry in enumerate(entries):
        key = _model_key(entry.get("model"), f"{where}: models.{i}")
        parameters = _parameters(entry.get("parameters") or {}, f"{where}: models.{i}.parameters")
        if needs_base and key == base_key:
            if parameters:
                raise RecipeError(f"{where}: models.{i}: the base takes no parameters")
            continue
        names[key] = _unique(Path(key[0]).name, set(names.values()))
        sources.append({"name": names[key], "path": key[0], "revision": key[1], "parameters": parameters})
    if method == "slerp" and base_key is not None:
        # The base is where t is 0, whatever the order of the models.
        sources.sort(key=lambda source: (source["path"], source["revision"]) != base_key)
    shared = _parameters(data.get("parameters") or {}, f"{where}: parameters")
    method_wide = {p.name for p in method_named(method).parameters if p.scope == "method"}
    if method.startswith("dare"):
        rescale = shared.pop("rescale", True)
        shared["rescale"] = "l1" if rescale else "none"
    for source in sources:
        # Parameters given once for the whole merge hold for every model that does not give its own.
        inherited = {name: value for name, value in shared.items() if name not in method_wide}
        source["parameters"] = {**inherited, **source["parameters"]}
    recipe: dict[str, Any] = {
        "method": method,
        "sources": sources,
        "parameters": {name: value for name, value in shared.items() if name in method_wide},
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


def _entries(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the models of a config; slices only where a single one covers every model from layer 0."""
    if (data.get("models") is None) == (data.get("slices") is None):
        raise RecipeError(f"{where}: expected either models or slices")
    entries = data.get("models")
    if entries is None:
        slices = data["slices"]
        if not isinstance(slices, list) or len(slices) != 1:
            raise RecipeError(
                f"{where}: slices: only a single slice over all layers is supported, got {len(slices)}"
            )
        entries = slices[0].get("sources")
        ranges = {tuple(entry.get("layer_range") or ()) for entry in entries or []}
        if len(ranges) > 1 or any(r and r[0] != 0 for r in ranges):
            raise RecipeError(f"{where}: slices: expected the same layers from 0 on of every model")
        entries = [{k: v for k, v in entry.items() if k != "layer_range"} for entry in entries or []]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise RecipeError(f"{where}: models: expected a list of mappings with a model each")
    for entry in entries:
        for key in entry:
            if key not in ("model", "parameters"):
                raise RecipeError(
                    f'{where}: models: unknown key "{key}"{nearest(key, ["model", "parameters"])}'
                )
    return entries


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


def _parameters(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping")
    return {
        str(name): _value(value, f"{where}.{name}") for name, value in data.items() if name not in IGNORED
    }


def _value(value: Any, where: str) -> Any:
    """Return a mergekit value (number, gradient, or list of filters) in a recipe's form."""
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return value
    rules = []
    for item in value:
        unknown = set(item) - {"filter", "value"}
        if unknown:
            raise RecipeError(f'{where}: unknown key "{unknown.pop()}"{nearest("", ["filter", "value"])}')
        rule = {"value": item.get("value")}
        if item.get("filter") not in (None, "*"):
            rule["match"] = str(item["filter"])
        rules.append(rule)
    return rules


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
    cleaned = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-") or "model"
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
    recipe = _without_expectation(recipe, layout)
    models = [
        {
            "model": _written(source.path, source.revision),
            "parameters": _all_written(source.parameters, layout),
        }
        for source in recipe.sources
    ]
    shared = _all_written(recipe.parameters, layout)
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
    # mergekit works in `dtype`; float32 there and the recipe's dtype for the output is what is done here.
    config["dtype"] = "float32"
    if recipe.dtype:
        config["out_dtype"] = recipe.dtype
    if recipe.tokenizer and recipe.tokenizer != recipe.reference.name:
        ref = next(ref for ref in recipe.refs if ref.name == recipe.tokenizer)
        config["tokenizer_source"] = _written(ref.path, ref.revision)
    return config


def _written(path: str, revision: str | None) -> Any:
    return {"model": {"path": path, "revision": revision}} if revision else path


def _all_written(settings: Mapping[str, Setting], layout: FilterSource) -> dict[str, Any]:
    return {name: _setting_written(setting, layout) for name, setting in settings.items()}


def _setting_written(setting: Setting, layout: FilterSource) -> Any:
    if len(setting) == 1:
        return _plain_value(setting[0].value)
    written = []
    for rule in setting:
        value = _plain_value(rule.value)
        if rule.general:
            written.append({"value": value})
        elif rule.role is not None and rule.match is not None:
            raise RecipeError("mergekit filters by one part of a name, not by role and name at once")
        elif rule.match is not None:
            written.append({"filter": rule.match, "value": value})
        else:
            parts = layout.filters(rule.role or "other")
            if not parts:
                raise RecipeError(f"mergekit has no filter for tensors of role {rule.role}")
            written += [{"filter": part, "value": value} for part in parts]
    return written


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _without_expectation(recipe: Recipe, layout: FilterSource) -> Recipe:
    """Move a rescaling by 1/density, which mergekit lacks, into the weights, where that is exact."""
    rescale = recipe.parameters.get("rescale")
    if rescale is None or rescale[0].value != "expectation":
        return recipe
    if any(rule.value is not False for rule in recipe.parameters["normalize"]):
        raise RecipeError("mergekit cannot rescale by 1/density and normalise the weights at once")
    depths = [i / max(layout.num_layers - 1, 1) for i in range(layout.num_layers)]
    data = recipe.to_json()
    data["parameters"]["rescale"] = "none"
    for source, written in zip(recipe.sources, data["sources"], strict=True):
        weight, density = source.parameters["weight"], source.parameters["density"]
        if [(r.role, r.match) for r in weight] != [(r.role, r.match) for r in density]:
            if len(density) > 1:
                raise RecipeError(
                    "mergekit cannot rescale by 1/density where weight and density differ in groups"
                )
            density = tuple(Rule(role=r.role, match=r.match, value=density[0].value) for r in weight)
        rules = []
        for w, d in zip(weight, density, strict=True):
            values = [float(w.at(t)) / float(d.at(t)) if d.at(t) else 0.0 for t in depths]
            rules.append({**w.model_dump(exclude_none=True), "value": values})
        written["parameters"]["weight"] = rules
    return parse_recipe(data, "recipe")


def is_evolve_config(data: Mapping[str, Any]) -> bool:
    """Whether plain data is a config of mergekit-evolve."""
    return "genome" in data and "tasks" in data


def read_evolve_config(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a mergekit-evolve config as the data of a run config.

    Its search starts at equal weights and full densities with step size 1/6; its `limit` becomes the number
    of search documents, with as many select documents beside them and the rest for the test.

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
    method = str(genome.get("merge_method"))
    if method not in ("linear", "slerp", "task_arithmetic", "ties", "dare_ties"):
        raise ConfigError(f'{where}: genome.merge_method: mergekit-evolve has no method "{method}"')
    try:
        keys = [_model_key(m, f"{where}: genome.models") for m in genome.get("models") or []]
        base = (
            _model_key(genome["base_model"], f"{where}: genome.base_model")
            if genome.get("base_model")
            else None
        )
    except UserError as problem:
        raise ConfigError(str(problem)) from None
    if method == "slerp" and len(keys) != 2:
        raise ConfigError(f"{where}: genome.models: slerp takes 2 models here, got {len(keys)}")
    names: dict[tuple[str, str | None], str] = {}
    for key in [*([base] if base else []), *keys]:
        names.setdefault(key, _unique(Path(key[0]).name, set(names.values())))
    refs = {key: {"name": name, "path": key[0], "revision": key[1]} for key, name in names.items()}
    granularity: Any = {"layers": genome["layer_granularity"]} if genome.get("layer_granularity") else "model"
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
    tokenizer = genome.get("tokenizer_source")
    if tokenizer not in (None, "base", "union"):
        space["tokenizer"] = names.get(_model_key(tokenizer, where))
    limit = data.get("limit")
    tasks = [{"name": t} if isinstance(t, str) else dict(t) for t in data["tasks"]]
    for task in tasks:
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
