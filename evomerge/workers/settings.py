"""The `workers` section of a run config, and what a worker needs to know to start."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from evomerge.fitness.settings import FitnessSettings
from evomerge.recipe import Dtype, Recipe, SourceRef
from evomerge.strict import StrictModel

EngineName = Literal["transformers", "vllm"]

NO_FUNCTION = "workers.engine: vllm only scores tasks; with fitness.function, use transformers"


def vllm_refuses(recipe: Recipe) -> str:
    """Return why vLLM cannot hold a recipe's model; empty if it can."""
    nested = any(ref.recipe is not None for ref in recipe.refs)
    if not recipe.slices and recipe.path is None and not nested:
        return ""
    kind = "slices" if recipe.slices else "a path" if recipe.path else "recipes as sources"
    return f"workers.engine: vllm keeps the layers it has; recipes with {kind} need transformers"


class WorkerSettings(StrictModel):
    """How many workers there are and what each may use.

    Attributes:
        pool: `ray`: actors of a Ray cluster; `inline`: in the driver itself, one at a time, for debugging
            (it cannot end a candidate that hangs).
        count: Number of workers, never more; `auto`: as many as fit, and on a cluster that other runs use too
            an equal share of it, given up and taken as runs come and go.
        cpus: CPUs of each worker.
        engine: What holds the model and scores it: `transformers`, or `vllm` for tasks on GPUs, which needs
            `pip install 'evomerge[vllm]'`.
        tensor_parallel: GPUs that `vllm` spreads each worker's model over.
        gpus: GPUs of each worker, may be a fraction; None: `tensor_parallel` where the cluster has any,
            else 0. With `transformers` several hold one model, an equal part of its layers each. With
            `vllm` a fraction is also the share of the GPU's memory: 0.5 puts two on a GPU.
        resources: Custom Ray resources of each worker.
        threads: Threads of each worker's arithmetic; None: its CPUs. Scores can differ in the last digit
            between thread counts.
        device: Where the model lives; `auto`: the GPU if the worker has one.
        dtype: The dtype the model is scored in; None: that of the merged weights. The scored model equals
            the exported one only with None.
        deadline_seconds: Longest time for one candidate on the search documents before its worker is
            killed; other document sets get proportionally more.
        retries: How often a candidate is tried again after its worker died or hung.
        memory_gib: Most memory of each worker for resident sources and prepared state; None: no limit.
        ray_address: Address of a running cluster; None: a Ray of our own on this machine.
    """

    pool: Literal["ray", "inline"] = "ray"
    count: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = "auto"
    cpus: float = Field(default=1.0, gt=0)
    engine: EngineName = "transformers"
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    gpus: float | None = Field(default=None, ge=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    threads: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype | None = None
    deadline_seconds: float = Field(default=3600.0, gt=0)
    retries: int = Field(default=2, ge=0, le=20)
    memory_gib: float | None = Field(default=None, gt=0)
    ray_address: str | None = None

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        parallel, gpus = self.tensor_parallel, self.gpus
        if self.engine != "vllm":
            if parallel > 1:
                raise ValueError(
                    "tensor_parallel: needs engine: vllm; with transformers, "
                    f"gpus: {parallel} spreads the model by layer"
                )
            if gpus is not None and gpus > 1 and gpus != int(gpus):
                raise ValueError(f"gpus: expected a fraction up to 1, or whole GPUs, got {gpus:g}")
            if gpus is not None and gpus > 1 and self.device == "cpu":
                raise ValueError(f"gpus: {gpus:g} GPUs hold no model with device: cpu")
            return self
        if self.device == "cpu":
            raise ValueError("device: engine vllm needs a GPU; got cpu")
        if gpus is not None and not (0 < gpus <= 1 if parallel == 1 else gpus == parallel):
            expected = "above 0 and at most 1" if parallel == 1 else f"{parallel}, as tensor_parallel says,"
            raise ValueError(f"gpus: expected {expected} with engine vllm, got {gpus:g}")
        return self

    @property
    def gpu_share(self) -> float:
        """Part of each of its GPUs that is a worker's own."""
        return min(1.0, self.gpus or 1.0)

    @property
    def whole_gpus(self) -> int:
        """Number of GPUs that a worker's model is on, at least 1."""
        return max(1, int(self.gpus or 1.0))


class WorkerSpec(StrictModel):
    """Everything a worker process needs, as plain data.

    Attributes:
        sources: Every checkpoint a recipe of the run may name, with fingerprints.
        reference: Name of the source that gives config and tensor names.
        tokenizer: Name of the source that gives the tokenizer.
        fitness: How to score.
        base_dir: What paths in the config are relative to.
        seed: The run's seed.
        device: `auto`, `cpu` or `cuda`.
        dtype: As in `WorkerSettings`.
        threads: Threads of the worker's arithmetic.
        memory_gib: As in `WorkerSettings`.
        engine: As in `WorkerSettings`.
        tensor_parallel: As in `WorkerSettings`.
        gpu_share: Part of each of its GPUs that is the worker's own.
        gpus: GPUs that hold the model of transformers.
    """

    sources: tuple[SourceRef, ...]
    reference: str
    tokenizer: str
    fitness: FitnessSettings
    base_dir: str
    seed: int
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype | None = None
    threads: int = 1
    memory_gib: float | None = None
    engine: EngineName = "transformers"
    tensor_parallel: int = 1
    gpu_share: float = 1.0
    gpus: int = 1
