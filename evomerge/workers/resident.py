"""The model that stays in a worker: it takes a recipe's weights, and has an engine that scores them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import CandidateError, EngineError, RecipeError
from evomerge.fitness.contract import ScoringEngine
from evomerge.fitness.engine import Engine
from evomerge.fitness.vllm_engine import VllmEngine, VllmSettings
from evomerge.merging.live import LiveModel
from evomerge.merging.weights import MergedWeights, Origin
from evomerge.recipe import Recipe, parse_recipe
from evomerge.workers.settings import WorkerSpec, vllm_refuses


class Resident(ABC):
    """A model in memory whose weights are those of the recipe applied last."""

    @abstractmethod
    def apply(self, recipe: Recipe) -> None:
        """Give the model the recipe's weights.

        Raises:
            CandidateError: The recipe has no merged model.
        """

    @abstractmethod
    def engine(self) -> ScoringEngine:
        """Return what scores the present weights."""


class TransformersResident(Resident):
    """A transformers model in this process; see `LiveModel`.

    Args:
        spec: What the worker was told.
        opened: The sources' checkpoints by name.
    """

    def __init__(self, spec: WorkerSpec, opened: Mapping[str, Checkpoint]) -> None:
        self._fitness = spec.fitness
        self._engine: Engine | None = None
        self._live = LiveModel(
            {ref.identity: opened[ref.name] for ref in spec.sources},
            opened[spec.reference],
            opened[spec.tokenizer],
            device=_devices(spec),
            dtype=spec.dtype,
            budget_bytes=_budget(spec),
        )

    @property
    def model(self) -> Any:
        """The transformers model; None before the first recipe."""
        return self._live.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._live.tokenizer

    def apply(self, recipe: Recipe) -> None:
        """Give the model the recipe's weights."""
        self._live.apply(recipe)
        self.model.eval()  # a callable may have left it in training mode

    def engine(self) -> ScoringEngine:
        """Return what scores the present weights."""
        if self._engine is None:
            settings = self._fitness
            self._engine = Engine(
                self.model, self.tokenizer, settings.batch_tokens, share_prefixes=settings.share_prefixes
            )
        self._engine.rebind(self.model)
        return self._engine


class VllmResident(Resident):
    """A model in vLLM; weights are merged on the CPU, since the GPU's memory is vLLM's.

    Args:
        spec: What the worker was told.
        opened: The sources' checkpoints by name.

    Raises:
        EngineError: vLLM cannot be used for this, or does not take new weights.
    """

    def __init__(self, spec: WorkerSpec, opened: Mapping[str, Checkpoint]) -> None:
        reference = opened[spec.reference]
        if not all(map(reference.is_stored, reference.tensors)):
            raise EngineError(
                f"workers.engine: vllm loads the first source from its files, but {spec.reference} is an "
                "adapter on its base; merge it first (evomerge merge), or use transformers"
            )
        self._origin = Origin(spec.sources, spec.reference, spec.base_dir, _budget(spec))
        self._engine = VllmEngine(
            VllmSettings(
                model=reference.path,
                tokenizer=opened[spec.tokenizer].path,
                dtype=spec.dtype or _written_dtype(reference.config) or reference.torch_dtype,
                tensor_parallel=spec.tensor_parallel,
                gpu_share=spec.gpu_share,
                batch_tokens=spec.fitness.batch_tokens,
                share_prefixes=spec.fitness.share_prefixes,
            )
        )
        alone = next(ref for ref in spec.sources if ref.name == spec.reference)
        own = parse_recipe(
            {"method": "linear", "sources": [alone.model_dump(exclude_none=True)]}, "reference"
        )
        self._engine.check_reloading(self._weights(own), self._weights(own, rolled=True))

    def _weights(self, recipe: Recipe, *, rolled: bool = False) -> MergedWeights:
        return MergedWeights(self._origin, recipe, rolled)

    def apply(self, recipe: Recipe) -> None:
        """Give the model the recipe's weights."""
        problem = vllm_refuses(recipe)
        if problem:
            raise EngineError(problem)
        known = {ref.identity for ref in self._origin.sources}
        for ref in recipe.refs:
            if ref.identity not in known:
                raise RecipeError(f"source {ref.name} ({ref.path}) is not among the checkpoints at hand")
        weights = self._weights(recipe)
        try:
            self._engine.load(recipe.digest, weights, self._weights(recipe, rolled=True))
        except CandidateError:
            if weights.problem is None:
                raise
        if weights.problem is not None:
            raise weights.problem

    def engine(self) -> ScoringEngine:
        """Return what scores the present weights."""
        return self._engine


def _devices(spec: WorkerSpec) -> str | list[str]:
    """Return where the model of transformers goes.

    Raises:
        EngineError: The process sees fewer GPUs than the model is to be on.
    """
    if spec.device == "cpu" or (spec.device == "auto" and not torch.cuda.is_available()):
        device = "cpu"
    else:
        device = "cuda"
    if spec.gpus == 1:
        return device
    if spec.gpus > torch.cuda.device_count():
        raise EngineError(
            f"workers.gpus: {spec.gpus} GPUs are to hold the model, but the worker sees "
            f"{torch.cuda.device_count()}"
        )
    return [f"cuda:{number}" for number in range(spec.gpus)]


def _written_dtype(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")


def _budget(spec: WorkerSpec) -> int | None:
    return None if spec.memory_gib is None else int(spec.memory_gib * 2**30)
