"""Sources that are recipes themselves: their models, tensor by tensor, without a file. Torch when read."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.compatible import check_compatible
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.opening import open_checkpoint
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging.outline import check_slices, outline, path_config
from evomerge.recipe import Recipe, SourceRef, parse_recipe

if TYPE_CHECKING:
    import torch

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def open_source(ref: SourceRef, base_dir: Path | None = None) -> Checkpoint:
    """Open what a source names: a checkpoint, perhaps with an adapter, or the model of a recipe.

    Args:
        ref: The source.
        base_dir: What relative paths are relative to; None: the working directory.

    Raises:
        SourceError: A checkpoint is missing or broken, or they do not fit together.
        RecipeError: The recipe brings its vocabulary into another form.
    """
    if ref.recipe is None and ref.path.startswith("run:"):
        raise RecipeError(f"source {ref.name}: {ref.path}: winners of runs are sources of run configs alone")
    if ref.recipe is None:
        return open_checkpoint(ref.path, ref.revision, base_dir)
    return MergedCheckpoint(ref.name, ref.recipe, base_dir)


class MergedCheckpoint(Checkpoint):
    """The model of a recipe as a checkpoint; tensors are merged when they are asked for.

    Path, tokenizer and generation config are those of the recipe's reference.

    Args:
        name: The source's name, for messages.
        recipe: The recipe.
        base_dir: What its relative paths are relative to.

    Attributes:
        recipe: The recipe with the fingerprints of what it reads.
        opened: Its own sources by name.
    """

    def __init__(self, name: str, recipe: Recipe, base_dir: Path | None = None) -> None:
        plain = recipe.tokenizer in (None, recipe.reference.name)
        if recipe.tokens or recipe.pad_to_multiple_of or recipe.chat_template or not plain:
            raise RecipeError(
                f"source {name}: its recipe changes tokenizer or chat template; write the model with "
                f"`evomerge merge` and name its folder"
            )
        self.opened = {ref.name: open_source(ref, base_dir) for ref in recipe.refs}
        layouts = {ref: layout_of(found) for ref, found in self.opened.items()}
        counts = {ref: layout.num_layers for ref, layout in layouts.items()}
        check_compatible(self.opened, sliced=bool(recipe.stack))
        check_slices(recipe, counts)
        self.recipe = _fingerprinted(recipe, self.opened)
        reference = self.opened[recipe.reference.name]
        layout = layouts[recipe.reference.name]
        config = dict(reference.config)
        if recipe.path is not None:
            config |= path_config({n: c.config for n, c in self.opened.items()}, recipe.path, counts)
        elif recipe.slices:
            raise RecipeError(f"source {name}: its recipe has slices; write it with a path")
        if recipe.dtype is not None:
            config["dtype"] = recipe.dtype
        super().__init__(reference.path, config, reference.files, [])
        self.ignored = reference.ignored
        for output in outline(recipe, layout).values():
            first, stored = next(iter(output.inputs.items()))
            info = self.opened[first].tensors[stored]
            dtype = _STORED[recipe.dtype] if recipe.dtype else info.dtype
            nbytes = info.nbytes // _BYTES[info.dtype] * _BYTES[dtype]
            self.tensors[output.place.name] = replace(
                info, name=output.place.name, dtype=dtype, nbytes=nbytes
            )
        self._layout = layout

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits): the recipe's digest over the content of what it reads."""
        return self.recipe.digest

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the reference's vocabulary."""
        return self.opened[self.recipe.reference.name].tokenizer_fingerprint

    @property
    def leaves(self) -> dict[str, Checkpoint]:
        """Every checkpoint that it reads, by its identity in the recipe."""
        found: dict[str, Checkpoint] = {}
        for ref in self.recipe.refs:
            opened = self.opened[ref.name]
            found |= opened.leaves if isinstance(opened, MergedCheckpoint) else {ref.identity: opened}
        return found

    def is_stored(self, name: str) -> bool:
        """Whether `tensor(name)` is a view of a file: never."""
        del name
        return False

    def scan_finite(self) -> None:
        """Read all weights that it is made of once and check them.

        Raises:
            SourceError: As for any checkpoint.
        """
        for opened in self.opened.values():
            opened.scan_finite()

    def tensor(self, name: str) -> torch.Tensor:
        """Merge one tensor, on the CPU."""
        tensor: torch.Tensor = self._merger.merge(self.recipe, name)
        return tensor

    @cached_property
    def _merger(self) -> Any:
        from evomerge.merging.merger import Merger

        by_identity = {ref.identity: self.opened[ref.name] for ref in self.recipe.refs}
        return Merger(by_identity, self._layout, budget_bytes=0)

    def __repr__(self) -> str:
        return f"MergedCheckpoint({self.recipe.method}, {self.num_parameters:,} parameters)"


def _fingerprinted(recipe: Recipe, opened: dict[str, Checkpoint]) -> Recipe:
    """Return a recipe whose sources are identified by their content."""
    data = recipe.to_json()
    for entry in [*data["sources"], *([data["base"]] if "base" in data else [])]:
        found = opened[entry["name"]]
        entry["fingerprint"] = found.fingerprint
        if isinstance(found, MergedCheckpoint):
            entry["recipe"] = found.recipe.to_json()
    return parse_recipe(data, "recipe")
