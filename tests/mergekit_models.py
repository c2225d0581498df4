"""The tiny models that `tests/data/mergekit/configs.yaml` names, and how mergekit reads its configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.catalogue import CATALOGUE
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.merging.merger import Merger
from evomerge.recipe import Recipe, value_at
from evomerge.records import Place
from evomerge.slices import Output, outline
from tests.checkpoints.tiny import make_llama

DATA = Path(__file__).parent / "data" / "mergekit"
CONFIGS: dict[str, Any] = yaml.safe_load((DATA / "configs.yaml").read_text("utf-8"))
READ = [name for name, config in CONFIGS.items() if config["merge_method"] in CATALOGUE]
"""Configs whose method evomerge has."""

LAYERS = 3
SEEDS = {"base": 0, "a": 1, "b": 2, "c": 3, "deep": 4}


def make_models(folder: Path) -> Path:
    """Make every model that a config names in a folder; equal on every machine."""
    for name, seed in SEEDS.items():
        fill(make_llama(folder / name, layers=5 if name == "deep" else 3, hidden=4, vocab=16), seed)
    return folder


def fill(path: Path, seed: int) -> None:
    """Give a checkpoint the weights cos(f * i + g), with f and g from the model and the tensor's place."""
    tensors = load_file(path / "model.safetensors")
    for place, name in enumerate(sorted(tensors)):
        index = torch.arange(tensors[name].numel(), dtype=torch.float64)
        values = torch.cos((0.31 + 0.17 * seed) * index + 0.7 * place + 1.3 * seed)
        tensors[name] = values.float().reshape(tensors[name].shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """Return a config with its models in a folder."""
    config: dict[str, Any] = copy.deepcopy(CONFIGS[name])
    for owner in _owners(config):
        key = "model" if "model" in owner else "base_model"
        owner[key] = str(folder / owner[key])
    return config


def _owners(data: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping in which a model is named."""
    if isinstance(data, dict):
        if "model" in data or "base_model" in data:
            yield data
        for value in data.values():
            yield from _owners(value)
    elif isinstance(data, list):
        for value in data:
            yield from _owners(value)


def merged(recipe: Recipe) -> dict[str, Tensor]:
    """Return the tensors of a recipe's model."""
    opened = {ref.name: Checkpoint.open(Path(ref.path)) for ref in recipe.refs}
    layout = layout_of(opened[recipe.reference.name])
    merger = Merger({ref.identity: opened[ref.name] for ref in recipe.refs}, layout)
    return {name: merger.merge(recipe, name) for name in merger.outputs(recipe)}


class Mergekit:
    """How mergekit reads a config: the value of a parameter for one tensor.

    The model's own settings come first, then the slice's, the module's, and those of the whole config; of a
    list of filters the first that is in the name counts, and if none is, the next place is asked; a gradient
    runs over the layers of a slice, whose only layer gets its last value, and everything outside the layers
    gets the first value, from the first or the last slice. A model's own parameters see the names of its
    tensors, the others those of the merged model.
    """

    def __init__(self, config: dict[str, Any], layers: int = LAYERS) -> None:
        module = (config.get("modules") or {}).get("default", {})
        self.outer = [module.get("parameters") or {}, config.get("parameters") or {}]
        self.slices = {**config, **module}.get("slices") or [{"sources": config["models"]}]
        spans = [piece["sources"][0].get("layer_range", [0, layers]) for piece in self.slices]
        self.counts = [end - first for first, end in spans]

    def value(self, name: str, output: Output, source: str | None = None, model: str | None = None) -> Any:
        """Return the value of a parameter for a tensor, of a source if one is given; None: there is none."""
        index, position = self.position(output.place)
        tensor = output.place.name if source is None else output.inputs[source]
        own = [e.get("parameters") or {} for e in self.slices[index]["sources"] if e["model"] == model]
        for settings in (*own, self.slices[index].get("parameters") or {}, *self.outer):
            if name in settings:
                value = self.resolved(settings[name], tensor, position)
                if value is not None:
                    return value
        return None

    def position(self, place: Place) -> tuple[int, float]:
        """Return the number of the slice, and where in its gradients the tensor lies."""
        if place.layer is None:
            return (0 if place.role == "embedding" else len(self.slices) - 1), 0.0
        layer = place.layer
        for index, count in enumerate(self.counts):
            if layer < count:
                return index, layer / (count - 1) if count > 1 else 1.0
            layer -= count
        raise AssertionError(place)

    def resolved(self, setting: Any, name: str, position: float) -> Any:
        """Return what a setting says for a tensor name at a position in gradients."""
        if isinstance(setting, dict):
            setting = [setting]
        if isinstance(setting, list) and all(isinstance(item, dict) for item in setting):
            for item in setting:
                if item.get("filter") in (None, "*") or item["filter"] in name:
                    return self.resolved(item["value"], name, position)
            return None
        if isinstance(setting, list):
            at = position * (len(setting) - 1)
            left, right = setting[math.floor(at)], setting[math.ceil(at)]
            return left + (right - left) * (at - math.floor(at))
        return setting


def reference_layout(recipe: Recipe) -> Layout:
    """Return the layout of a recipe's reference."""
    return layout_of(Checkpoint.open(Path(recipe.reference.path)))


def check_same(there: Mergekit, recipe: Recipe) -> None:
    """Check that every parameter that mergekit finds a value for has this value in the recipe."""
    for output in outline(recipe, reference_layout(recipe)).values():
        owners: list[tuple[Any, ...]] = [(None, None, recipe.parameters)]
        owners += [(s.name, s.path, s.parameters) for s in recipe.sources if s.name in output.inputs]
        for source, model, settings in owners:
            for parameter, setting in settings.items():
                expected = there.value(parameter, output, source, model)
                if parameter == "rescale":
                    expected = "none" if expected is False else "l1"
                if expected is not None:
                    found = value_at(setting, output.place)
                    same = found == expected if isinstance(found, str) else math.isclose(found, expected)
                    assert same, (parameter, output, found, expected)
