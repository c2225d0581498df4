"""Recipe to resident model: one model is built once and its weights are replaced for each candidate."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from evomerge.checkpoints.flows import flow_of
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError, SourceError
from evomerge.merging.dataflow import assemble
from evomerge.merging.merger import DTYPES, Merger
from evomerge.merging.nested import MergedCheckpoint
from evomerge.merging.outline import outlined_config
from evomerge.merging.spreading import Spread, layers_of, run_where_weights_are
from evomerge.recipe import LayerPath, Recipe, RecipeSource, Slice, parse_recipe


class LiveModel:
    """A transformers model whose weights are those of the recipe applied last.

    The first candidate goes through transformers' own loading, so the model is what loading the exported
    files gives. Where that keeps the tensors under the checkpoint's own names (dense decoders), later
    candidates are merged into the parameters in place; where it renames or fuses tensors (mixtures of
    experts), every candidate is loaded anew.

    For a recipe with a path the models of its sources are resident, each once; see `merging.dataflow`.

    Args:
        checkpoints: Each checkpoint under its source's identity.
        reference: The checkpoint that gives config, tensor names and order.
        tokenizer: The checkpoint that gives the tokenizer.
        device: Where the model lives; several share its layers in equal parts.
        dtype: The dtype the model runs in; None: the dtype that transformers picks for the exported model.
        budget_bytes: Most memory for resident sources and prepared state; None: no limit.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        reference: Checkpoint,
        tokenizer: Checkpoint,
        *,
        device: str | Sequence[str] = "cpu",
        dtype: str | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self._spread = Spread([device] if isinstance(device, str) else device)
        self._dtype = DTYPES[dtype] if dtype else None
        self._layout = layout_of(reference)
        self._merger = Merger(checkpoints, self._layout, device=self._spread, budget_bytes=budget_bytes)
        with quiet():
            if isinstance(reference, MergedCheckpoint):  # its layers need not be those of the files
                self._config = AutoConfig.for_model(**reference.config)
            else:
                self._config = AutoConfig.from_pretrained(reference.path, trust_remote_code=False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer.path, trust_remote_code=False)
        self._reference = reference
        self._built: tuple[torch.dtype, tuple[Slice, ...]] | None = None
        self._targets: dict[str, Tensor] | None = None
        self._checkpoints, self._budget = checkpoints, budget_bytes
        self._tokenized = tokenizer
        self._residents: dict[str, tuple[LiveModel, str]] = {}
        self.model: Any = None

    def apply(self, recipe: Recipe) -> None:
        """Give the model the recipe's weights.

        Raises:
            CandidateError: The recipe's parameters have no merged model (weights that sum to zero, ...).
            SourceError: The checkpoints lack a tensor that the config calls for.
        """
        if recipe.path is not None:
            self._follow(recipe, recipe.path)
            return
        dtype = self._dtype or self._exported_dtype(recipe)
        if self._targets is None or self._built != (dtype, recipe.slices):
            self._build(recipe, dtype)
            return
        for name, target in self._targets.items():
            self._merger.merge(recipe, name, out=target)

    def _follow(self, recipe: Recipe, path: LayerPath) -> None:
        """Make the model one of the resident layers of its sources."""
        self.model = self._targets = None
        dtype = self._dtype or self._exported_dtype(recipe)
        models = {source.name: self._resident(source, dtype) for source in recipe.sources}
        for i, step in enumerate(path.layers):
            count = models[step.source].config.num_hidden_layers
            if step.layer >= count:
                raise RecipeError(
                    f"path.layers.{i}: {step.source} has {count} layers, got layer {step.layer}"
                )
        flow = flow_of(models[path.end].config.to_dict())
        self.model = assemble(models, path, flow, self._layout.layers)
        if len(self._spread.devices) > 1:
            # The other parts are the very modules of a resident model, which was settled.
            run_where_weights_are(self.model, layers_of(self.model, self._layout.layers))

    def _resident(self, source: RecipeSource, dtype: torch.dtype) -> Any:
        """Return the model of a source; that of a recipe takes the place of an earlier one of its name."""
        recipe = source.recipe
        if recipe is None:
            plain = {"name": source.name, "path": source.path, "fingerprint": source.fingerprint}
            recipe = parse_recipe({"method": "passthrough", "sources": [plain]}, source.name)
        key = source.identity if source.recipe is None else f"recipe {source.name}"
        live, digest = self._residents.get(key, (None, ""))
        if live is None:
            checkpoints = {**self._checkpoints}
            for checkpoint in self._checkpoints.values():
                checkpoints |= checkpoint.leaves if isinstance(checkpoint, MergedCheckpoint) else {}
            reference = checkpoints[recipe.reference.identity]
            name = next(name for name, known in DTYPES.items() if known == dtype)
            live = LiveModel(
                checkpoints,
                reference,
                self._tokenized,
                device=[str(device) for device in self._spread.devices],
                dtype=name,
                budget_bytes=self._budget,
            )
        if digest != recipe.digest:
            self._residents[key] = live, ""  # a merge that fails leaves it half overwritten
            live.apply(recipe)
        self._residents[key] = live, recipe.digest
        return live.model

    def _exported_dtype(self, recipe: Recipe) -> torch.dtype:
        """Return what `dtype="auto"` gives for the exported model: the config's, else the weights'."""
        if recipe.dtype is not None:
            return DTYPES[recipe.dtype]
        written = getattr(self._config, "dtype", None)
        if isinstance(written, torch.dtype):
            return written
        floating = (self._merger.dtype_of(recipe, name) for name in self._merger.outputs(recipe))
        return next(dtype for dtype in floating if dtype.is_floating_point)

    def _build(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = self._targets = None  # room for the new one
        state = {name: self._merger.merge(recipe, name) for name in self._merger.outputs(recipe)}
        config = self._config
        if recipe.slices:
            config = type(config).from_dict(outlined_config(config.to_dict(), recipe, self._layout))
        with quiet():
            with torch.device("meta"):  # the config is copied, as transformers writes into it
                kind = type(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
            model, info = kind.from_pretrained(
                None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            missing = min(info["missing_keys"])
            raise SourceError(f"{self._reference.path}: lacks tensor {missing}, which its config calls for")
        model.eval().requires_grad_(False)
        self._spread.settle(model, self._layout.layers, self._layout.places)
        if (self._reference.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self._reference.path)
        self._targets, self._built, self.model = _targets(model, state), (dtype, recipe.slices), model


def _targets(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return checkpoint tensor name to model tensor, or None if the model does not hold them one to one.

    Args:
        model: The model that was loaded from `state`.
        state: Every tensor of the checkpoint.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if not state.keys() <= tensors.keys():
        return None
    targets = {name: tensors[name].data for name in state}
    shared = len({target.data_ptr() for target in targets.values() if target.numel()}) < len(targets)
    same = all(target.equal(state[name].to(target)) for name, target in targets.items())
    return targets if same and not shared else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and notices of transformers and the hub for a block of code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
