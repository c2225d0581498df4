"""Recipe to resident model: one model is built once and its weights are replaced for each candidate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import SourceError
from evomerge.merging.merger import DTYPES, Merger
from evomerge.recipe import Recipe


class LiveModel:
    """A transformers model whose weights are those of the recipe applied last.

    Where the model keeps the tensors under the checkpoint's own names (dense decoders), a candidate is
    merged into the parameters in place. Where transformers renames or fuses tensors on loading (some
    mixtures of experts), the merged tensors go through its own conversion, and the model is built anew.

    Args:
        checkpoints: Each checkpoint under its source's identity.
        reference: The checkpoint that gives config, tensor names and order.
        tokenizer: The checkpoint that gives the tokenizer.
        device: Where the model lives.
        dtype: The dtype the model runs in; None: the dtype that transformers picks for the exported model.
        budget_bytes: Most memory for resident sources and prepared state; None: no limit.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        reference: Checkpoint,
        tokenizer: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._dtype = DTYPES[dtype] if dtype else None
        self._layout = layout_of(reference)
        self._merger = Merger(checkpoints, self._layout, device=self.device, budget_bytes=budget_bytes)
        with quiet():
            self._config = AutoConfig.from_pretrained(reference.path, trust_remote_code=False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer.path, trust_remote_code=False)
        self._reference = reference
        self._targets: dict[str, Tensor] = {}
        self.model: Any = None

    def apply(self, recipe: Recipe) -> None:
        """Give the model the recipe's weights.

        Raises:
            CandidateError: The recipe's parameters have no merged model (weights that sum to zero, ...).
        """
        dtype = self._dtype or self._exported_dtype(recipe)
        if self.model is None or self.model.dtype != dtype or not self._targets:
            self._build(recipe, dtype)
        for name, target in self._targets.items():
            self._merger.merge(recipe, name, out=target)

    def _exported_dtype(self, recipe: Recipe) -> torch.dtype:
        """Return what `dtype="auto"` gives for the exported model: the config's, else the weights'."""
        if recipe.dtype is not None:
            return DTYPES[recipe.dtype]
        written = getattr(self._config, "dtype", None)
        if isinstance(written, torch.dtype):
            return written
        floating = (self._merger.dtype_of(recipe, name) for name in self._layout.places)
        return next(dtype for dtype in floating if dtype.is_floating_point)

    def _build(self, recipe: Recipe, dtype: torch.dtype) -> None:
        with quiet(), torch.device(self.device):
            model = AutoModelForCausalLM.from_config(self._config, dtype=dtype)
        targets = _matching(model, self._layout)
        if targets is None:
            state = {name: self._merger.merge(recipe, name) for name in self._layout.places}
            with quiet():
                model = (
                    type(model)
                    .from_pretrained(
                        None, config=self._config, state_dict=state, dtype=dtype, local_files_only=True
                    )
                    .to(self.device)
                )
            self._targets = {}
        else:
            self._targets = targets
        model.eval().requires_grad_(False)
        generation = self._reference.path / "generation_config.json"
        if generation.is_file():
            model.generation_config = GenerationConfig.from_pretrained(self._reference.path)
        self.model = model


def _matching(model: Any, layout: Layout) -> dict[str, Tensor] | None:
    """Return checkpoint tensor name to model tensor, or None if the model has other names.

    Where the checkpoint stores a tied head beside the embedding, the embedding is what counts, as it is
    when transformers loads such a checkpoint.
    """
    names = list(layout.places)
    heads = {name for name, place in layout.places.items() if place.role == "head"}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    targets: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(names, key=heads.__contains__):
        if name not in tensors:
            return None
        target = tensors[name].data
        if target.data_ptr() in seen and target.numel():
            continue
        seen.add(target.data_ptr())
        targets[name] = target
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in seen]
    if missing:
        raise SourceError(f"the checkpoint lacks tensor {missing[0]}, which its config calls for")
    return targets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and notices of transformers and the hub for a block of code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
