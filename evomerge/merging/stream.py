"""Recipe to files: every tensor is read, merged and written in turn; memory holds a few tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.layout import check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint, resolve
from evomerge.checkpoints.tokenizer import copy_tokenizer
from evomerge.checkpoints.writer import DTYPES as WRITABLE
from evomerge.checkpoints.writer import Writer, check_target
from evomerge.merging.merger import Merger
from evomerge.merging.outline import Output
from evomerge.recipe import Recipe, SourceRef

SAFETENSORS_DTYPES = {dtype: name for name, dtype in WRITABLE.items()}


def open_sources(refs: Iterable[SourceRef], base_dir: Path | None = None) -> dict[str, Checkpoint]:
    """Open the checkpoints that a recipe names.

    Returns:
        Source name to checkpoint, in the order of `refs`.

    Raises:
        SourceError: One is missing or broken, or they do not fit together.
    """
    opened = {ref.name: Checkpoint.open(resolve(ref.path, ref.revision, base_dir=base_dir)) for ref in refs}
    if len(opened) > 1:
        check_compatible(opened)
    return opened


def write_model(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    target: Path,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the merged model as a Hugging Face directory, all or nothing.

    Args:
        recipe: What to merge.
        checkpoints: Source name to checkpoint, for every source of the recipe.
        target: The directory to make; it must not exist.
        texts: More files by name, such as a model card.
        progress: Called with bytes written and bytes in all.

    Returns:
        `target`.

    Raises:
        UserError: The target exists, cannot be written, or the disk is full.
    """
    check_target(target)
    by_identity = {ref.identity: checkpoints[ref.name] for ref in recipe.refs}
    reference = checkpoints[recipe.reference.name]
    layout = layout_of(reference)
    merger = Merger(by_identity, layout, budget_bytes=0)
    outputs = merger.outputs(recipe)
    names = list(outputs)
    dtypes = [merger.dtype_of(recipe, name) for name in names]
    shapes = [_shape(output, checkpoints) for output in outputs.values()]
    plan = [
        (name, SAFETENSORS_DTYPES[dtype], shape)
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True)]
    done = 0
    with Writer(target, plan=plan) as writer:
        for name, size in zip(names, sizes, strict=True):
            writer.add(name, merger.merge(recipe, name))
            done += size
            progress(done, sum(sizes))
        writer.add_json("config.json", merged_config(reference.config, recipe))
        generation = reference.path / "generation_config.json"
        if generation.is_file():
            writer.copy_file(generation)
        copy_tokenizer(checkpoints[recipe.tokenizer or recipe.reference.name].path, writer)
        for name, text in (texts or {}).items():
            writer.add_text(name, text)
        return writer.commit()


def _shape(output: Output, checkpoints: Mapping[str, Checkpoint]) -> tuple[int, ...]:
    source, name = next(iter(output.inputs.items()))
    return checkpoints[source].tensors[name].shape


def merged_config(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the reference's config with the recipe's dtype and without traces of where it lay."""
    merged = {key: value for key, value in config.items() if key != "_name_or_path"}
    if recipe.dtype is not None:
        merged.pop("torch_dtype", None)
        merged["dtype"] = recipe.dtype
    return merged
