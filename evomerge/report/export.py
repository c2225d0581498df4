"""A candidate of a run as a plain Hugging Face checkpoint, with recipe, mergekit config and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.card import Row, SourceCard, model_card, read_license
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError, StoreError
from evomerge.mergekit_writer import to_mergekit
from evomerge.merging.nested import MergedCheckpoint
from evomerge.merging.stream import open_sources, write_model
from evomerge.recipe import Recipe, parse_recipe
from evomerge.report.summary import Summary
from evomerge.store import RunView
from evomerge.strict import dump_yaml

Notice = Callable[[str], None]


def export_candidate(
    run: RunView,
    target: Path,
    number: int | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write one candidate as a model directory, all or nothing.

    Args:
        run: The run.
        target: The directory to make.
        number: The candidate; None: the winner.
        progress: Called with bytes written and bytes in all.

    Raises:
        UserError: There is no such candidate, a source changed since, or the target exists.
    """
    summary = Summary(run)
    if number is None:
        number = summary.best
    if number is None:
        raise StoreError(f'run "{run.name}": no candidate has been scored yet, so there is nothing to export')
    if number not in summary.candidates:
        raise StoreError(f'run "{run.name}": there is no candidate {number}')
    stored = parse_recipe(summary.recipe(number), f"candidate {number}")
    recipe = stored.located(Path(run.facts["base_dir"]))
    opened = open_sources(recipe)
    for ref in recipe.refs:
        if opened[ref.name].fingerprint != ref.identity:
            raise StoreError(
                f"source {ref.name} ({ref.path}) changed since the run: the export would not be the model "
                "that was scored; restore it"
            )
    texts = {
        "recipe.yaml": recipe.to_yaml(),
        "README.md": _card(summary, number, recipe, opened, target.name),
    }
    mergekit = mergekit_yaml(recipe, opened)
    if mergekit is not None:
        texts["mergekit.yaml"] = mergekit
    return write_model(recipe, opened, target, texts=texts, progress=progress)


def mergekit_yaml(recipe: Recipe, opened: dict[str, Checkpoint]) -> str | None:
    """Return the recipe as a mergekit config, None where mergekit cannot express it."""
    try:
        config = to_mergekit(recipe, layout_of(opened[recipe.reference.name]))
    except RecipeError:
        return None
    return dump_yaml(config)


def _source_cards(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> list[SourceCard]:
    """Return what a card says of every checkpoint that a recipe reads, each once."""
    cards: dict[str, SourceCard] = {}
    for ref in recipe.refs:
        found = opened[ref.name]
        if ref.recipe is not None and isinstance(found, MergedCheckpoint):
            below = _source_cards(ref.recipe, found.opened)
        else:
            license_ = read_license(found.path)
            below = [SourceCard(ref.name, ref.path, ref.revision, ref.fingerprint or "", license_)]
        for card in below:
            cards.setdefault(card.fingerprint or card.location, card)
    return list(cards.values())


def _card(summary: Summary, number: int, recipe: Recipe, opened: dict[str, Checkpoint], name: str) -> str:
    sources = _source_cards(recipe, opened)
    data = summary.to_json()
    winner = data["best"] is not None and data["best"]["candidate"] == number
    rows = []
    lines = [summary.row(summary.candidates[number], name), *data["baselines"]]
    for row in lines:
        test: dict[str, Any] | None = row["test"]
        if test is not None:
            tasks = {task: (found["metric"], found["stderr"]) for task, found in test["tasks"].items()}
            rows.append(Row(row["name"], tasks, (test["score"], test.get("low"), test.get("high"))))
    gain = data["gain"] if winner else None
    warnings = [] if gain and gain["shown"] else [data["verdict"]]
    if not winner:
        warnings = ["This is not the winner of its run; it was exported by its number."]
    return model_card(
        name=name,
        base_models=sources,
        method="data_flow" if recipe.path else recipe.method,
        recipe_yaml=recipe.to_yaml(),
        results=rows,
        gain=(gain["mean"], gain["low"], gain["high"]) if gain and gain["low"] is not None else None,
        gain_over=gain["over"] if gain else "the best baseline",
        warnings=warnings,
    )
