"""What one worker does with one job: build the model, score it, and answer with an outcome.

It never raises for a bad candidate: the candidate's fault comes back as an outcome.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import torch

from evomerge.checkpoints.node_cache import NodeCache
from evomerge.errors import CandidateError, EngineError, EvomergeError, redacted
from evomerge.fitness.function import evaluate_function, load_function
from evomerge.fitness.harness import Evaluation, Harness
from evomerge.fitness.racing import Race
from evomerge.fitness.tasks import TaskSet
from evomerge.merging.nested import open_source
from evomerge.recipe import Recipe, parse_recipe
from evomerge.records import DocumentSet, Outcome
from evomerge.workers.pool import Job
from evomerge.workers.resident import TransformersResident, VllmResident
from evomerge.workers.settings import NO_FUNCTION, WorkerSpec


class Worker:
    """Owns one device, or the GPUs of one engine, and one live model.

    Args:
        spec: What to load; the first job pays for building the model.

    Raises:
        UserError: A source, a task or the engine does not work; weights that are not finite are found here.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        base_dir = Path(spec.base_dir)
        self._cache = NodeCache.of_node(os.environ)
        if self._cache is not None:
            local = tuple(self._cache.localized(ref, base_dir) for ref in spec.sources)
            spec = spec.model_copy(update={"sources": local})
        opened = {ref.name: open_source(ref, base_dir) for ref in spec.sources}
        for checkpoint in opened.values():
            checkpoint.scan_finite()
        self._function = load_function(spec.fitness.function, base_dir) if spec.fitness.function else None
        self._tasks = None if self._function else TaskSet(spec.fitness, spec.seed, base_dir)
        self._resident: TransformersResident | VllmResident
        if spec.engine == "vllm":
            self._resident = VllmResident(spec, opened)
        else:
            self._resident = TransformersResident(spec, opened)
        self._harness: Harness | None = None

    def run(self, job: Job) -> Outcome:
        """Build and score one candidate.

        Raises:
            EngineError: The engine cannot be trusted or cannot do what the run asks, whatever the candidate.
        """
        started = time.perf_counter()
        try:
            return self._run(job, started)
        except EngineError:
            raise
        except CandidateError as problem:
            return self._failed(job, "invalid", str(problem), started)
        except EvomergeError as problem:
            return self._failed(job, "failed", str(problem), started)
        # Whatever a task or callable raises, `sys.exit` too, costs this candidate only.
        except (Exception, SystemExit) as problem:
            place = traceback.extract_tb(problem.__traceback__)[-1]
            text = (str(problem).splitlines() or [""])[0]
            reason = f"{type(problem).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            return self._failed(job, "failed", reason, started)

    def _run(self, job: Job, started: float) -> Outcome:
        recipe = parse_recipe(dict(job.recipe), "recipe")
        self._resident.apply(recipe)
        merged = time.perf_counter()
        evaluation = self._evaluate(recipe, DocumentSet.of_key(job.documents), job.race)
        ended = time.perf_counter()
        return Outcome(
            candidate=job.candidate,
            documents=job.documents,
            status="stopped" if evaluation.stopped else "ok",
            score=evaluation.score,
            stderr=evaluation.stderr,
            tasks=evaluation.tasks,
            values=evaluation.values,
            cost={
                "merge": merged - started,
                "evaluate": ended - merged,
                "total": ended - started,
                **evaluation.counts,
            },
        )

    def _evaluate(self, recipe: Recipe, documents: DocumentSet, race: Race | None) -> Evaluation:
        resident = self._resident
        if self._function is not None:
            if not isinstance(resident, TransformersResident):
                raise EngineError(NO_FUNCTION)
            return evaluate_function(
                self._function, resident.model, resident.tokenizer, recipe, documents, self._spec.seed
            )
        if self._tasks is None:
            raise ValueError("a worker has neither tasks nor a function")
        engine = resident.engine()
        if self._harness is None:
            self._harness = Harness(self._tasks, engine)
        return self._harness.evaluate(documents, race)

    @staticmethod
    def _failed(job: Job, status: str, reason: str, started: float) -> Outcome:
        seconds = time.perf_counter() - started
        return Outcome(
            candidate=job.candidate,
            documents=job.documents,
            status="invalid" if status == "invalid" else "failed",
            reason=redacted(reason),
            cost={"total": seconds},
        )
