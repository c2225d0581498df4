"""Which configs a service takes from its clients: data, and names of what its operator put there.

Whoever may submit may spend the workers; nobody may bring code. Every path of a config has to lie below one
of the operator's roots after symbolic links are followed; a hub id names no file here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evomerge.config import RunConfig, parse_config
from evomerge.errors import ConfigError, Gathering
from evomerge.mergekit_evolve import is_evolve_config, read_evolve_config
from evomerge.recipe import Recipe, SourceRef
from evomerge.service.settings import ServiceSettings
from evomerge.sourcing import RUN
from evomerge.strict import parse_yaml

WHERE = "config"
"""What a client's config is called in messages."""


def parse_submitted(config: dict[str, Any] | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return what a client sent, plain data or YAML, as a config.

    Raises:
        ConfigError: In one line with the key.
    """
    data = parse_yaml(config, WHERE, ConfigError) if isinstance(config, str) else config
    if not isinstance(data, dict):
        raise ConfigError(f"{WHERE}: expected a mapping with sources, space and fitness")
    if is_evolve_config(data):
        data = read_evolve_config(data, Path(WHERE))
    return parse_config(data, WHERE, overrides)


def key_of(message: str) -> str | None:
    """Return the path of the key that a message about a config begins with; None if it names none."""
    found = re.match(r"([a-z_]+(?:\.[\w-]+)*): ", message.removeprefix(f"{WHERE}: "))
    return found[1] if found and found[1] != WHERE else None


def digest_of(config: RunConfig, folder: Path) -> str:
    """Return the digest of a submission."""
    data = {"config": config.model_dump(mode="json"), "folder": str(folder)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def folder_of(settings: ServiceSettings, given: str | None) -> Path:
    """Return the folder that a client's paths are relative to.

    Args:
        settings: With the roots.
        given: An absolute path, or one relative to the first root; None: the first root.

    Raises:
        ConfigError: It is no folder below a root.
    """
    folder = _below_a_root(settings, settings.roots[0], given or ".", "folder")
    if not folder.is_dir():
        raise ConfigError(f"folder: {given}: there is no such folder on the service's machine")
    return folder


def admit(config: RunConfig, folder: Path, settings: ServiceSettings) -> None:
    """Refuse a config that reaches beyond what the operator put below the roots.

    Raises:
        ConfigError: In one line with the key, for each key.
    """
    with Gathering() as gathering:
        for problem in _taken(config, settings):
            with gathering.kept():
                raise ConfigError(problem)
        with gathering.kept():
            for key, path in _paths(config):
                with gathering.kept():
                    _below_a_root(settings, folder, path, key)


def _taken(config: RunConfig, settings: ServiceSettings) -> Iterator[str]:
    """Yield what is wrong with keys that only the operator decides about."""
    if config.store is not None:
        yield "store: the service has its own; leave the key out"
    if config.output.folder is not None:
        yield "output.folder: the service decides where results go; leave the key out"
    if config.trackers:
        yield "trackers: they write where the service may; its operator has `evomerge track`"
    if config.workers.ray_address is not None:
        yield "workers.ray_address: the service's operator names the cluster; leave the key out"
    if config.fitness.allow_unsafe_code and not settings.allow_unsafe_code:
        yield (
            "fitness.allow_unsafe_code: tasks that run what a model writes are not allowed here; "
            "the operator can allow them with --allow-unsafe-code"
        )


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield every path that a config names, with its key."""
    for ref in config.sources.all:
        yield from _source_paths(ref, f"sources: {ref.name}")
    for place, path in enumerate(config.optimizer.start):
        yield f"optimizer.start.{place}", path
    founders = config.optimizer.settings.get("founders")
    if founders is not None:
        yield "optimizer.founders", str(founders)
    for place, path in enumerate(config.fitness.include_paths):
        yield f"fitness.include_paths.{place}", path
    for place, task in enumerate(config.fitness.tasks):
        if task.name.endswith((".yaml", ".yml")) or "/" in task.name or "\\" in task.name:
            yield f"fitness.tasks.{place}.name", task.name
    function = config.fitness.function
    if function is not None:
        path, _, _ = function.rpartition(":")
        if not path.endswith(".py"):
            raise ConfigError(
                f"fitness.function: {function}: expected FILE.py:NAME below the service's roots, "
                "not an importable module"
            )
        yield "fitness.function", path


def _source_paths(ref: SourceRef, key: str) -> Iterator[tuple[str, str]]:
    if ref.recipe is not None:
        yield from _recipe_paths(ref.recipe, key)
    if ref.path.startswith(RUN):
        return
    yield f"{key}: path", ref.path
    for place, letter in enumerate(ref.path):
        if letter == "+":  # perhaps a base with an adapter
            yield f"{key}: path", ref.path[:place]
            yield f"{key}: path", ref.path[place + 1 :]


def _recipe_paths(recipe: Recipe, key: str) -> Iterator[tuple[str, str]]:
    for ref in recipe.refs:
        yield from _source_paths(ref, f"{key}: recipe: {ref.name}")


def _below_a_root(settings: ServiceSettings, folder: Path, path: str, key: str) -> Path:
    """Return the place that a path means; raise ConfigError if no root holds it.

    A hub id such as `org/name` is read as a path here too, and then lies below the folder.
    """
    if "\0" in path or len(path) > 4096:
        raise ConfigError(f"{key}: expected a path, got {path[:80]!r}")
    try:
        found = (folder / Path(path).expanduser()).resolve()
    except (OSError, RuntimeError):
        raise ConfigError(f"{key}: {path}: cannot be resolved") from None
    if not any(found.is_relative_to(root) for root in settings.roots):
        raise ConfigError(
            f"{key}: {path}: lies outside the folders that this service reads; its operator names them with "
            "--root"
        )
    return found
