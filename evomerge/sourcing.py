"""Sources of a config that are models of recipes: winners of other runs, and recipe files."""

from __future__ import annotations

from pathlib import Path

from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.mergekit import read_any_recipe
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.report.summary import Summary
from evomerge.store import Store

RUN = "run:"
"""What a source's path begins with if it is the winner of a run."""


def with_recipes(config: RunConfig, base_dir: Path, store: Store | None) -> RunConfig:
    """Return a config whose sources of the form `run:NAME` or `FILE.yaml` hold the recipe that they name.

    So the recipe is part of the run: a file or another run that changes later changes nothing.

    Args:
        config: The config.
        base_dir: What its paths are relative to.
        store: Where runs are looked for; None: there is none yet.

    Raises:
        UserError: There is no such run, it has no winner yet, or the file is no recipe.
    """

    def filled(ref: SourceRef) -> SourceRef:
        found = None
        if ref.recipe is None and ref.path.startswith(RUN):
            found = _winner(ref, store)
        elif ref.recipe is None and ref.path.endswith((".yaml", ".yml")):
            file = base_dir / Path(ref.path).expanduser()
            found = read_any_recipe(file).located(file.parent.resolve())
        return ref if found is None else ref.model_copy(update={"recipe": found})

    sources = config.sources
    base = filled(sources.base) if sources.base else None
    models = tuple(filled(ref) for ref in sources.models)
    return config.model_copy(update={"sources": sources.model_copy(update={"base": base, "models": models})})


def names_runs(config: RunConfig) -> bool:
    """Return whether any source is the winner of a run."""
    return any(ref.recipe is None and ref.path.startswith(RUN) for ref in config.sources.all)


def _winner(ref: SourceRef, store: Store | None) -> Recipe:
    name = ref.path.removeprefix(RUN)
    if store is None:
        raise ConfigError(f"source {ref.name}: {ref.path}: there is no store yet; name it with --store")
    view = store.run(name)
    summary = Summary(view)
    if summary.best is None or not summary.chosen:
        raise ConfigError(
            f"source {ref.name}: run {name} has no winner yet; go on with it by `evomerge resume {name}`"
        )
    stored = parse_recipe(summary.recipe(summary.best), f"run {name}")
    return stored.located(Path(view.facts["base_dir"]))
