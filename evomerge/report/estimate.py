"""What a run would do, from its config and the headers of its sources: sizes, memory, time. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evomerge.config import RunConfig
from evomerge.errors import FitnessError
from evomerge.fitness.tasks import LoadedTask, lm_eval_quiet
from evomerge.plan import Plan

CPU_FLOPS_PER_CORE = 2e10
GPU_FLOPS = 1.5e14
BYTES_PER_SECOND = {"cpu": 5e9, "cuda": 1e12}


def estimate(config: RunConfig, base_dir: Path) -> dict[str, Any]:
    """Check a config in every way that needs no worker, and say what a run would do.

    Seconds are rough: arithmetic at usual speeds, prompts at four characters a token.

    Returns:
        `summary` (label to text), `warnings`, and the numbers behind them.

    Raises:
        UserError: Something in the config does not work.
    """
    plan = Plan(config, base_dir)
    plan.scan_sources()
    first = next(iter(plan.checkpoints.values()))
    source_bytes = sum(checkpoint.nbytes for checkpoint in plan.checkpoints.values())
    state = plan.space.method.state_bytes * first.num_parameters * len(config.sources.models)
    memory, remade = _memory(config, state, source_bytes, first.nbytes)
    counts = {
        split: sum(len(ids) for ids in plan.document_sets().get(split, {}).values())
        for split in ("search", "select", "test")
    }
    scored = (config.fitness.resample or 0) * len(plan.tasks.tasks if plan.tasks else ()) or counts["search"]
    seconds = _seconds(plan, scored, first.num_parameters, source_bytes)
    cores = config.workers.cpus
    count = config.workers.count
    workers = max(1, int((os.cpu_count() or 1) / cores)) if count == "auto" else count
    total = {device: value * config.budget.evaluations / workers for device, value in seconds.items()}
    per_task = [f"{rule.metric} of {name}, weight {rule.weight:g}" for name, rule in plan.rules.items()]
    # The dimensions of segments are coefficients of one row; how many rows there are is searched too.
    size = "" if config.space.kind == "segments" else f", {len(plan.space.dimensions)} dimensions"
    summary = {
        "run": config.name,
        "sources": ", ".join(plan.refs),
        "family": f"{plan.layout.family}, {plan.layout.num_layers} layers, "
        f"{first.num_parameters:,} parameters",
        "space": plan.space.title + size,
        "optimizer": config.optimizer.name,
        "fitness": config.fitness.function or "; ".join(per_task),
        "documents": ", ".join(f"{n} {split}" for split, n in counts.items()),
        "candidates": f"{config.budget.evaluations} searched after {len(plan.seeded)} baselines and starts",
        "memory per worker": f"{memory / 2**30:.2f} GiB, and {source_bytes / 2**30:.2f} GiB of mapped files",
        "prepared state": f"{state / 2**30:.2f} GiB"
        + ("; what workers.memory_gib leaves out is made again for each candidate" if remade else ""),
        "rough time of the search": f"{_hours(total['cpu'])} on CPUs, {_hours(total['cuda'])} on GPUs, "
        f"{workers} worker{'s' if workers != 1 else ''}",
    }
    if config.fitness.function:
        del summary["documents"], summary["rough time of the search"]
    return {
        "name": config.name,
        "summary": summary,
        "warnings": plan.warnings,
        "dimensions": [dimension.label for dimension in plan.space.dimensions],
        "documents": counts,
        "memory_bytes": memory,
        "source_bytes": source_bytes,
        "seconds_per_candidate": seconds,
    }


def _memory(config: RunConfig, state: float, sources: int, model: int) -> tuple[float, bool]:
    """Return the bytes of one worker, and whether the limit leaves out some of what is kept.

    Args:
        config: The run's.
        state: Bytes of prepared state.
        sources: Bytes of all sources.
        model: Bytes of one of them.
    """
    kept = state + (sources if config.workers.device == "cuda" else 0)
    budget = kept if config.workers.memory_gib is None else config.workers.memory_gib * 2**30
    # Where paths are searched, every source is resident; a merge that is searched with them comes on top.
    resident = sources if config.space.kind in ("data_flow", "layer_edits") else model
    if config.space.kind == "joint":
        resident += sources
    return resident + min(kept, budget), budget < kept


def _seconds(plan: Plan, documents: int, parameters: int, source_bytes: int) -> dict[str, float]:
    """Return rough seconds for one candidate by device: bytes merged, then tokens forwarded."""
    flops = 2.0 * parameters * documents * _tokens_per_document(plan)
    cpu = CPU_FLOPS_PER_CORE * plan.config.workers.cpus
    return {
        "cpu": flops / cpu + source_bytes / BYTES_PER_SECOND["cpu"],
        "cuda": flops / GPU_FLOPS + source_bytes / BYTES_PER_SECOND["cuda"],
    }


def _tokens_per_document(plan: Plan) -> float:
    """Return the tokens forwarded for one search document, guessed from the length of a few."""
    if plan.tasks is None:
        return 0.0
    lengths: list[float] = []
    for name, loaded in plan.tasks.tasks.items():
        try:
            with lm_eval_quiet():
                lengths += _lengths(loaded)
        except Exception as problem:  # whatever templates and documents that do not fit each other raise
            text = (str(problem).splitlines() or [""])[0]
            raise FitnessError(
                f"fitness.tasks.{name}: its prompts cannot be built: {type(problem).__name__}: {text}"
            ) from problem
    return sum(lengths) / len(lengths)


def _lengths(loaded: LoadedTask) -> list[float]:
    """Return the tokens of the first search documents of a task, at four characters each."""
    task, lengths = loaded.task, []
    for i in loaded.ids["search"][:5]:
        document = task.eval_docs[i]
        text = len(str(task.doc_to_text(document))) * (1 + (task.config.num_fewshot or 0))
        rows, written = 1, 0
        if task.OUTPUT_TYPE == "multiple_choice":
            rows = len(task.doc_to_choice(document))
        elif task.OUTPUT_TYPE == "generate_until":
            written = 4 * int((task.config.generation_kwargs or {}).get("max_gen_toks", 256))
        lengths.append(rows * text / 4 + written / 4 + 1)
    return lengths


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
