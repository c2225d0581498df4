"""Scoring one model outside any run, exactly as a worker scores a candidate."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.checkpoints.opening import located, open_checkpoint
from evomerge.config import RunConfig
from evomerge.errors import FitnessError
from evomerge.recipe import SourceRef, parse_recipe
from evomerge.records import Outcome
from evomerge.workers.pool import Job
from evomerge.workers.settings import WorkerSpec
from evomerge.workers.worker import Worker


def evaluate_model(model: str, config: RunConfig, base_dir: Path, split: str) -> Outcome:
    """Score a model on one split of a config's documents.

    Args:
        model: A directory, relative to the working directory, or a hub id.
        config: Only its fitness, seed and workers count.
        base_dir: What the config's paths are relative to.
        split: `search`, `select` or `test`.

    Raises:
        UserError: The model or the tasks do not work, or the model cannot be scored.
    """
    fingerprint = open_checkpoint(model).fingerprint
    source = SourceRef(name="model", path=located(model, Path()), fingerprint=fingerprint)
    spec = WorkerSpec(
        sources=(source,),
        reference="model",
        tokenizer="model",
        fitness=config.fitness,
        base_dir=str(base_dir),
        seed=config.seed,
        device=config.workers.device,
        dtype=config.workers.dtype,
        threads=config.workers.threads or os.cpu_count() or 1,
        engine=config.workers.engine,
        tensor_parallel=config.workers.tensor_parallel,
        gpu_share=config.workers.gpu_share,
        gpus=config.workers.whole_gpus,
    )
    recipe = parse_recipe({"method": "linear", "sources": [source.model_dump(exclude_none=True)]}, "model")
    outcome = Worker(spec).run(Job(0, recipe.to_json(), split, float("inf")))
    if outcome.status != "ok":
        raise FitnessError(f"{model}: cannot be scored: {outcome.reason}")
    return outcome
