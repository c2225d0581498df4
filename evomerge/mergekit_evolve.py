"""Reading the configs of mergekit-evolve as run configs. No torch.

What has no counterpart here is refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, UserError, nearest
from evomerge.mergekit import model_key, unique

Key = tuple[str, str | None]
"""A path or hub id, and a revision."""

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")

KNOWN = frozenset(
    {
        "genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template",
        "fewshot_as_multiturn",
    }
)  # fmt: skip

KNOWN_GENOME = frozenset(
    {
        "models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
        "allow_negative_weights", "filters", "smooth",
    }
)  # fmt: skip


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
    genome, where = data["genome"], str(path)
    _check_keys(data, genome, where)
    try:
        keys = [model_key(m, f"{where}: genome.models.{i}") for i, m in enumerate(genome["models"])]
        base, tokenizer = (
            None if genome.get(key) in nothing else model_key(genome[key], f"{where}: genome.{key}")
            for key, nothing in (("base_model", (None,)), ("tokenizer_source", (None, "base", "union")))
        )
    except UserError as problem:
        raise ConfigError(str(problem)) from None
    names: dict[Key, str] = {}
    for key in [*([base] if base else []), *keys]:
        names.setdefault(key, unique(Path(key[0]).name, set(names.values())))
    refs = {key: {"name": name, "path": key[0], "revision": key[1]} for key, name in names.items()}
    space = _space(genome, len(keys), where)
    if tokenizer is not None:
        if tokenizer not in names:
            raise ConfigError(f"{where}: genome.tokenizer_source: {tokenizer[0]} is none of the models")
        space["tokenizer"] = names[tokenizer]
    on_deltas = space["method"] not in ("linear", "slerp")
    sources: dict[str, Any] = {"models": [refs[key] for key in keys if key != base or not on_deltas]}
    if base and (on_deltas or base not in keys):
        sources["base"] = refs[base]
    return {
        "sources": sources,
        "space": space,
        "optimizer": {"name": "cma_es", "lr_adapt": False},
        "fitness": _fitness(data, where),
        "budget": {"evaluations": 100},
    }


def _check_keys(data: Mapping[str, Any], genome: Any, where: str) -> None:
    """Refuse what is unknown, malformed, or has no counterpart here."""
    for part, known, prefix in ((data, KNOWN, ""), (genome, KNOWN_GENOME, "genome.")):
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


def _space(genome: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
    """Return the space section."""
    method = str(genome.get("merge_method"))
    if method not in METHODS:
        raise ConfigError(f'{where}: genome.merge_method: mergekit-evolve has no method "{method}"')
    if method == "slerp" and models != 2:
        raise ConfigError(f"{where}: genome.models: slerp takes 2 models here, got {models}")
    parameters: dict[str, Any] = {"t": {}}
    if method != "slerp":
        normalize = genome.get("normalize")
        parameters = {
            "weight": {"low": -1.0 if genome.get("allow_negative_weights") else 0.0, "high": 1.0},
            "normalize": method != "task_arithmetic" if normalize is None else normalize,
        }
    if method in ("ties", "dare_ties"):
        parameters["density"] = {"low": 0.0 if method == "ties" else 0.01, "high": 1.0}
    if method == "dare_ties":
        parameters["rescale"] = "l1"
    step = genome.get("layer_granularity") or 0
    return {
        "method": method,
        "granularity": {"layers": step} if not isinstance(step, int) or step > 0 else "model",
        "split": genome.get("filters") or [],
        "parameters": parameters,
        "dtype": "bfloat16",
    }


def _fitness(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fitness section."""
    tasks = []
    for i, given in enumerate(data["tasks"]):
        if not isinstance(given, str | Mapping):
            raise ConfigError(f"{where}: tasks.{i}: expected a name or a mapping, got {given!r}")
        task = {"name": given} if isinstance(given, str) else dict(given)
        task.setdefault("metric", "acc,none")
        if data.get("num_fewshot") is not None:
            task["num_fewshot"] = data["num_fewshot"]
        tasks.append(task)
    fitness: dict[str, Any] = {
        "tasks": tasks,
        "chat_template": data.get("apply_chat_template", True),
        "fewshot_as_multiturn": data.get("fewshot_as_multiturn", True),
    }
    if limit := data.get("limit"):
        fitness["documents"] = {"search": limit, "select": limit, "test": "rest"}
    return fitness
