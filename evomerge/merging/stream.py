"""Recipe to files: every tensor is read, merged and written in turn; memory holds a few tensors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from evomerge.checkpoints.aligned import align
from evomerge.checkpoints.layout import Layout, check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.writer import DTYPES as WRITABLE
from evomerge.checkpoints.writer import MAX_SHARD_BYTES, PlanEntry, Writer, check_target
from evomerge.errors import CandidateError, SourceError, UserError
from evomerge.merging.folding import check_path
from evomerge.merging.loops import all_finite
from evomerge.merging.merger import Merger
from evomerge.merging.nested import open_source
from evomerge.merging.outline import Output, check_slices, outlined_config, path_config
from evomerge.recipe import Recipe

SAFETENSORS_DTYPES = {dtype: name for name, dtype in WRITABLE.items()}


def _ignore(notice: str) -> None:
    del notice


def open_sources(
    recipe: Recipe, base_dir: Path | None = None, notice: Callable[[str], None] = _ignore
) -> dict[str, Checkpoint]:
    """Open the checkpoints that a recipe names.

    Args:
        recipe: Its sources may be adapters.
        base_dir: What relative paths are relative to; None: the working directory.
        notice: Called with each line about a difference that is allowed but may hurt.

    Returns:
        Source name to checkpoint, in the order of the recipe's `refs`.

    Raises:
        SourceError: One is missing or broken, or they do not fit together.
        RecipeError: A slice asks for layers that a source does not have.
    """
    opened = {ref.name: open_source(ref, base_dir) for ref in recipe.refs}
    if len(opened) > 1:
        aligning, sliced = recipe.tokenizer is not None, bool(recipe.stack)
        for line in check_compatible(opened, aligning=aligning, sliced=sliced):
            notice(line)
    if recipe.stack:
        check_slices(recipe, {name: layout_of(found).num_layers for name, found in opened.items()})
    check_path(recipe, opened)
    return opened


def check_device(device: str) -> None:
    """Raise UserError unless torch can compute on a device of that name here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f'device: "{device}" cannot be used here ({reason}); expected cpu, cuda, cuda:1, ...'
        ) from None


def write_model(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    target: Path,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    notice: Callable[[str], None] = _ignore,
    device: str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the merged model as a Hugging Face directory, all or nothing.

    Each tensor is written while the next are merged. Memory: one tensor of every source where it must be
    computed or moved to a device, else none, and three merged tensors.

    Args:
        recipe: What to merge.
        checkpoints: Source name to checkpoint, for every source of the recipe.
        target: The directory to make; it must not exist.
        texts: More files by name, such as a model card.
        progress: Called with bytes written and bytes in all.
        notice: Called with each line about vocabulary or rules that the reader should know.
        device: Where tensors are merged.
        max_shard_bytes: Largest weight file; a larger tensor gets a file of its own.

    Returns:
        `target`.

    Raises:
        UserError: The target exists, cannot be written, or the disk is full.
        SourceError: A source holds NaN or infinity.
        CandidateError: The recipe's parameters have no merged model, or its dtype cannot hold it.
    """
    check_target(target)
    check_path(recipe, checkpoints)
    checkpoints, vocabulary = align(checkpoints, recipe)
    for line in vocabulary.warnings:
        notice(line)
    reference = checkpoints[recipe.reference.name]
    by_identity = {ref.identity: checkpoints[ref.name] for ref in recipe.refs}
    merger = Merger(by_identity, layout_of(reference), device=device, budget_bytes=0)
    plan = _plan(recipe, checkpoints, merger)
    for line in _unmatched(recipe, merger.outputs(recipe)):
        notice(line)
    with Writer(target, plan=plan, max_shard_bytes=max_shard_bytes) as writer:
        _write_tensors(writer, plan, merger, recipe, checkpoints, progress)
        config = merged_config(reference.config, recipe, merger.layout)
        if recipe.path is not None:
            counts = {name: layout_of(found).num_layers for name, found in checkpoints.items()}
            configs = {name: found.config for name, found in checkpoints.items()}
            config |= path_config(configs, recipe.path, counts)
        writer.add_json("config.json", vocabulary.config(config))
        generation = vocabulary.generation_config(reference)
        if generation is not None:
            writer.add_json("generation_config.json", generation)
        vocabulary.write(writer)
        for name, text in (texts or {}).items():
            writer.add_text(name, text)
        return writer.commit()


def _write_tensors(
    writer: Writer,
    plan: Sequence[PlanEntry],
    merger: Merger,
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    progress: Callable[[int, int], None],
) -> None:
    total, done = sum(_nbytes(entry) for entry in plan), 0
    outputs = merger.outputs(recipe)
    with _Behind(writer) as behind:
        for entry in plan:
            _check_inputs(outputs[entry[0]], checkpoints)
            merged = merger.merge(recipe, entry[0])
            _check_result(merged, entry[0], recipe)
            behind.add(entry[0], merged)
            done += _nbytes(entry)
            progress(done, total)
        behind.finish()


class _Behind:
    """Writes tensors on a thread of its own, so that merging goes on meanwhile; at most two wait."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()

    def add(self, name: str, tensor: Tensor) -> None:
        """Hand over a tensor; what went wrong with an earlier one is raised here."""
        self._waiting.append(self._thread.submit(self._writer.add, name, tensor))
        if len(self._waiting) > 2:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], merger: Merger) -> list[PlanEntry]:
    return [
        (name, SAFETENSORS_DTYPES[merger.dtype_of(recipe, name)], _shape(output, checkpoints))
        for name, output in merger.outputs(recipe).items()
    ]


def _nbytes(entry: PlanEntry) -> int:
    return math.prod(entry[2]) * WRITABLE[entry[1]].itemsize


def _check_inputs(output: Output, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise SourceError if a source's tensor holds NaN or infinity, which a method may well drop."""
    for source, name in output.inputs.items():
        checkpoint = checkpoints[source]
        if checkpoint.is_stored(name) and not all_finite(checkpoint.tensor(name).contiguous()):
            problem = f'tensor "{name}" holds NaN or infinity; the checkpoint is damaged'
            raise SourceError(f"{checkpoint.path}: {problem}")


def _check_result(merged: Tensor, name: str, recipe: Recipe) -> None:
    """Raise CandidateError if a merged tensor is more than its dtype can hold."""
    if not all_finite(merged):
        dtype = str(merged.dtype).removeprefix("torch.")
        other = "" if recipe.dtype == "bfloat16" else ', or "dtype: bfloat16"'
        raise CandidateError(
            f"{name}: the merged values exceed what {dtype} can hold; use smaller weights{other}"
        )


def _unmatched(recipe: Recipe, outputs: Mapping[str, Output]) -> Iterator[str]:
    """Yield a line for each rule that is for no tensor."""
    places = [output.place for output in outputs.values()]
    settings = [("parameters", recipe.parameters)]
    settings += [(f"sources.{source.name}.parameters", source.parameters) for source in recipe.sources]
    for where, owner in settings:
        for name, rules in owner.items():
            for rule in rules:
                if not rule.general and not any(rule.applies(place) for place in places):
                    wanted = ", ".join(str(part) for part in (rule.role, rule.match) if part is not None)
                    yield f'{where}.{name}: no tensor is "{wanted}"; this rule does nothing'


def _shape(output: Output, checkpoints: Mapping[str, Checkpoint]) -> tuple[int, ...]:
    source, name = next(iter(output.inputs.items()))
    return checkpoints[source].tensors[name].shape


def merged_config(config: Mapping[str, Any], recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Return the reference's config with the recipe's dtype and layers, without traces of where it lay."""
    merged = outlined_config(config, recipe, layout)
    merged.pop("_name_or_path", None)
    if recipe.dtype is not None:
        merged.pop("torch_dtype", None)
        merged["dtype"] = recipe.dtype
    return merged
