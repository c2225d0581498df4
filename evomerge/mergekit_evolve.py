"""Reading the configs of mergekit-evolve as run configs. No torch.

What has no counterpart here is refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, UserError, nearest
from evomerge.mergekit import model_key, unique


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
        keys = [model_key(m, f"{where}: genome.models.{i}") for i, m in enumerate(genome["models"])]
        base = (
            model_key(genome["base_model"], f"{where}: genome.base_model")
            if genome.get("base_model")
            else None
        )
        tokenizer = genome.get("tokenizer_source")
        token_key = (
            None
            if tokenizer in (None, "base", "union")
            else model_key(tokenizer, f"{where}: genome.tokenizer_source")
        )
    except UserError as problem:
        raise ConfigError(str(problem)) from None
    if method == "slerp" and len(keys) != 2:
        raise ConfigError(f"{where}: genome.models: slerp takes 2 models here, got {len(keys)}")
    names: dict[tuple[str, str | None], str] = {}
    for key in [*([base] if base else []), *keys]:
        names.setdefault(key, unique(Path(key[0]).name, set(names.values())))
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
